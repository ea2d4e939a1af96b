"""Perplexity file by file, worked out another way."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from headwise import MHMoEConfig, MoEConfig, MoHConfig, convert
from headwise.training.evaluation import (
    FileLoss,
    RoutingStatistics,
    file_losses,
    perplexity,
    routed_text,
)
from tiny import llama

T = 8


@pytest.fixture
def model():
    attention = MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02)
    return convert(llama(num_key_value_heads=2), attention=attention).eval()


@pytest.fixture
def files():
    generator = np.random.default_rng(0)
    sizes = {"long": 100, "short": 5, "one token": 1, "empty": 0, "two blocks": 11}
    return {name: generator.integers(0, 31, n).astype(np.int32) for name, n in sizes.items()}


def test_loss_of_a_file_is_that_of_its_blocks(model, files):
    losses = file_losses(model, files, sequence_length=T, max_blocks=99)
    assert [loss.tokens for loss in losses] == [12 * 7 + 3, 4, 7 + 2]
    for name, loss in zip(("long", "short", "two blocks"), losses, strict=True):
        nats = 0.0
        for block in np.split(files[name], range(T, len(files[name]), T)):
            ids = torch.from_numpy(block.astype(np.int64)).unsqueeze(0)
            nats += model(ids, labels=ids).loss.item() * (len(block) - 1)
        assert loss.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loss_does_not_depend_on_the_batch(model, files, batch_size):
    options = {"sequence_length": T, "max_blocks": 5}
    losses = file_losses(model, files, batch_size=batch_size, **options)
    np.testing.assert_allclose(losses, file_losses(model, files, **options), rtol=1e-5)


def test_at_most_max_blocks_spread_over_the_file(model, files):
    (loss,) = file_losses(model, {"long": files["long"]}, sequence_length=T, max_blocks=3)
    assert loss.tokens == 7 + 7 + 3  # the first block, one in the middle, the last of 4 tokens


def test_perplexity_by_hand():
    # e^1, e^2 and e^4 with 1, 1 and 2 tokens: all tokens exp(11 / 4); quartiles between files.
    losses = [FileLoss(1.0, 1), FileLoss(2.0, 1), FileLoss(8.0, 2)]
    value, low, high = perplexity(losses)
    assert value == pytest.approx(math.exp(11 / 4))
    assert low == pytest.approx((math.e + math.e**2) / 2)
    assert high == pytest.approx((math.e**2 + math.e**4) / 2)


def test_loads_count_real_tokens_only(model, files):
    loads = []
    for batch_size in (1, 64):
        statistics = RoutingStatistics(model)
        file_losses(
            model, files, sequence_length=T, max_blocks=99, batch_size=batch_size,
            observe=partial(statistics.add, "text"),
        )  # fmt: skip
        loads.append(np.array(statistics.head_loads().by_domain["text"]))
        assert statistics.expert_loads() is None
    assert loads[0].shape == (2, 6)
    np.testing.assert_allclose(loads[0][:, :2], 1)  # shared heads
    np.testing.assert_allclose(loads[0].sum(axis=1), 4)
    np.testing.assert_allclose(*loads, atol=0.01)


def head_loads(files, attention, *, num_kv_heads):
    model = convert(llama(num_key_value_heads=num_kv_heads), attention=attention).eval()
    statistics = RoutingStatistics(model)
    file_losses(
        model, files, sequence_length=T, max_blocks=99,
        observe=partial(statistics.add, "text"),
    )  # fmt: skip
    return statistics.head_loads()


def test_loads_say_which_heads_are_shared(files):
    attention = MoHConfig(shared=[[1, 3], [0, 1]], active=4)
    loads = head_loads(files, attention, num_kv_heads=6)
    assert loads.shared_heads == [[1, 3], [0, 1]]
    first = loads.by_domain["text"][0]
    assert (first[1], first[3]) == (1, 1)
    assert loads.routed("text", 0) == [first[0], first[2], first[4], first[5]]


def test_loads_of_routed_groups_are_of_heads(files):
    groups = {"route_groups": True, "router": "two_stage", "router_std": 0.02}
    attention = MoHConfig(shared=2, active=4, **groups)
    loads = head_loads(files, attention, num_kv_heads=3)
    assert loads.shared_heads == [[0, 1]] * len(loads.by_domain["text"])
    for layer in loads.by_domain["text"]:
        assert layer[0::2] == layer[1::2]
        assert sum(layer) == pytest.approx(4)


@pytest.mark.parametrize("sub_tokens", [1, 3])
def test_experts_are_counted_over_all_forwards(files, sub_tokens):
    mlp = MoEConfig(num_experts=7, top_k=2, expert_dim=5)
    if sub_tokens > 1:
        mlp = MHMoEConfig(num_heads=sub_tokens, num_experts=7, top_k=2, expert_dim=5)
    model = convert(llama(num_hidden_layers=3), mlp=mlp, every=2).eval()
    statistics = RoutingStatistics(model)
    file_losses(
        model, files, sequence_length=T, max_blocks=99, batch_size=5,
        observe=partial(statistics.add, "text"),
    )  # fmt: skip
    experts = statistics.expert_loads()
    assert (experts.layers, experts.top_k) == ([1], 2)
    # Of the files with 100, 5 and 11 tokens, padded to blocks of 8.
    assert experts.assignments == {"text": [116 * sub_tokens * 2]}
    (load,), (overlap,) = experts.by_domain["text"], experts.overlap["text"]
    assert sum(load) == pytest.approx(1)
    if sub_tokens == 1:
        assert overlap is None
    else:
        assert overlap * 116 * 3 * 2 == pytest.approx(round(overlap * 116 * 3 * 2))
        assert 0 < overlap < 1


@pytest.mark.parametrize("batch_size", [3, 64])
def test_domains_are_compared_by_file(batch_size):
    """Blocks of several files share a batch; a file weighs what it has tokens."""
    attention = MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02)
    mlp = MoEConfig(num_experts=7, top_k=2, expert_dim=5)
    model = convert(llama(num_hidden_layers=3), attention=attention, mlp=mlp, every=2).eval()
    generator = np.random.default_rng(0)
    # Files of the same names in both domains; of one word each, so that they differ.
    domains = {
        domain: {f"{i}": np.full(n, token, dtype=np.int32) for i, n in enumerate(sizes)}
        for domain, token, sizes in (("ones", 1, [11, 5, 1, 23]), ("twos", 2, [7, 13, 29, 3]))
    }
    domains["mixed"] = {"0": generator.integers(0, 31, 17), "1": generator.integers(0, 31, 19)}
    statistics = RoutingStatistics(model)
    for domain, files in domains.items():
        file_losses(
            model, files, sequence_length=T, max_blocks=99, batch_size=batch_size,
            observe=partial(statistics.add, domain),
        )  # fmt: skip
    heads, experts = statistics.head_loads(), statistics.expert_loads()
    for loads, layers, width in ((heads, 3, 6), (experts, 1, 7)):
        found = loads.difference
        # A file of one token has no block.
        assert found.documents == {"mixed": 2, "ones": 3, "twos": 4}
        assert found.candidates() == [width] * layers
        for layer, tested in enumerate(found.layers):
            by_domain = np.array([x[layer] for x in loads.by_domain.values()])
            assert tested.effects == pytest.approx(100 * np.ptp(by_domain, axis=0))
    assert all(layer.p_values[:2] == [1, 1] for layer in heads.difference.layers)  # shared


def test_domains_that_cannot_be_compared_are_not(model, files):
    def difference(*domains):
        statistics = RoutingStatistics(model)
        for domain, some in domains:
            file_losses(
                model, some, sequence_length=T, max_blocks=9,
                observe=partial(statistics.add, domain),
            )  # fmt: skip
        return statistics.head_loads().difference

    assert difference(("text", files)) is None
    assert difference(("text", files), ("one file", {"long": files["long"]})) is None
    assert difference(("text", files), ("again", files)).over_all.p_value == 1


def test_routed_text_names_the_heads_of_every_token(model):
    class Letters:
        """A tokenizer's decode."""

        def decode(self, ids):
            return chr(97 + ids[0])

    text = routed_text(model, Letters(), "letters", np.arange(5, dtype=np.int32))
    assert "".join(text.tokens) == "abcde"
    assert [len(layer) for layer in text.heads_on] == [5, 5]
    assert all(len(on) == 4 and on[:2] == [0, 1] for layer in text.heads_on for on in layer)
