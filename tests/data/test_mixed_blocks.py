"""Blocks drawn from domains: shares, order, what is refused."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from headwise.data.text import MixedBlocks


def blocks(
    sizes: tuple[int, ...] = (100, 25), num_blocks: int = 30, exponent: float = 0.5, seed: int = 0
) -> MixedBlocks:
    """Domain d counts up from 1000 · d; a block has 5 tokens."""
    streams = {
        f"domain {d}": np.arange(size, dtype=np.int32) + 1000 * d for d, size in enumerate(sizes)
    }
    return MixedBlocks(
        streams, sequence_length=5, num_blocks=num_blocks, exponent=exponent, seed=seed
    )


def first_tokens(dataset: MixedBlocks) -> list[int]:
    return [dataset[i]["input_ids"][0].item() for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("exponent", "counts"),
    [(0.0, (15, 15)), (0.5, (20, 10)), (1.0, (24, 6))],  # weights 1:1, 10:5, 100:25
)
def test_shares_follow_the_exponent(exponent, counts):
    dataset = blocks(exponent=exponent)
    drawn = Counter(token // 1000 for token in first_tokens(dataset))
    assert (drawn[0], drawn[1]) == counts
    assert dataset.shares == {f"domain {d}": count / 30 for d, count in enumerate(counts)}


def test_blocks_left_by_rounding_go_to_the_largest_domain():
    dataset = blocks((100, 50, 50), num_blocks=7, exponent=1)  # 3.5, 1.75, 1.75 → 3, 1, 1 and 2
    assert Counter(token // 1000 for token in first_tokens(dataset)) == {0: 5, 1: 1, 2: 1}


def test_a_block_is_consecutive_tokens_and_its_own_labels():
    dataset = blocks()
    for item in (dataset[i] for i in range(len(dataset))):
        start = item["input_ids"][0]
        assert start % 5 == 0
        assert torch.equal(item["input_ids"], torch.arange(5) + start)
        assert torch.equal(item["labels"], item["input_ids"])
        assert item["input_ids"].dtype == torch.int64


def test_no_block_repeats_before_all_were_drawn():
    dataset = blocks((103,), num_blocks=50)  # 20 blocks and 3 tokens: 2 rounds and a half
    times = Counter(first_tokens(dataset))
    assert len(times) == 20
    assert set(times.values()) == {2, 3}
    fewer = first_tokens(blocks((103,), num_blocks=20))
    assert sorted(fewer) == list(range(0, 100, 5))


def test_domains_are_mixed_not_one_after_another():
    domains = [token // 1000 for token in first_tokens(blocks(num_blocks=300))]
    changes = sum(a != b for a, b in pairwise(domains))
    assert changes > 50


def test_draw_follows_the_seed():
    assert first_tokens(blocks(seed=1)) == first_tokens(blocks(seed=1))
    assert first_tokens(blocks(seed=1)) != first_tokens(blocks(seed=2))


def test_domain_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match=r"'domain 1' has 4 tokens .* sequence_length = 5"):
        blocks((100, 4))
    assert len(blocks((100, 5))) == 30
