"""Attention over pages equals that over the same keys side by side."""

from itertools import accumulate

import pytest
import torch
from torch.testing import assert_close

from headwise.ops import head_attention
from headwise.ops.attention.pages import paged_attention

H, HKV, C, PAGES = 6, 2, 22, 701
# Queries and keys of each document: those that go on by a token, by two, a prompt, and a part.
DOCUMENTS = {
    "tokens": ((1, 131), (1, 1), (1, 67)),
    "few, then many": ((1, 131), (2, 5), (37, 37), (19, 53)),
    "many first": ((37, 41), (1, 131)),
    "long": ((1, 640), (1, 7)),
}

pytestmark = pytest.mark.usefixtures("kernels_built")


def example(documents, *, on=0.6, dtype=torch.float32):
    queries, keys = (list(accumulate(sizes, initial=0)) for sizes in zip(*documents, strict=True))
    return {
        "q": torch.randn(1, queries[-1], H, C, dtype=dtype),
        "k_pages": torch.randn(PAGES, HKV, C, dtype=dtype),
        "v_pages": torch.randn(PAGES, HKV, C, dtype=dtype),
        "gate": torch.rand(1, queries[-1], H) * (torch.rand(1, queries[-1], H) < on),
        "places": torch.randperm(PAGES)[: keys[-1]],
        "cu_seqlens": torch.tensor(queries),
        "cu_seqlens_k": torch.tensor(keys),
    }


def by_copying(*, q, k_pages, v_pages, gate, places, **options):
    k, v = (pages[places][None] for pages in (k_pages, v_pages))
    return head_attention(q, k, v, gate, causal=True, **options, impl="reference")


@torch.no_grad()
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"scale": 0.7}, {"scale": -0.3}])
@pytest.mark.parametrize("whole", [torch.int32, torch.int64])
def test_it_equals_attention_over_copied_keys(documents, options, whole):
    given = example(documents)
    for name in ("places", "cu_seqlens", "cu_seqlens_k"):
        given[name] = given[name].to(whole)
    got = paged_attention(**given, **options)
    assert_close(got, by_copying(**given, **options), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16():
    given = example(DOCUMENTS["few, then many"], dtype=torch.bfloat16)
    assert_close(paged_attention(**given), by_copying(**given), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_what_no_head_of_a_document_needs_is_not_read(kernels_built):
    if not kernels_built:
        pytest.skip("without kernels all heads are copied")
    given = example(DOCUMENTS["tokens"], on=1)
    given["gate"][:, 1, :] = 0
    given["gate"][:, 2, 3:] = 0
    want = paged_attention(**given)
    _, second, third = given["places"].split([131, 1, 67])
    for pages in (given["k_pages"], given["v_pages"]):
        pages[second] = torch.nan
        pages[third, 1] = torch.nan
        others = torch.ones(PAGES, dtype=torch.bool).index_fill(0, given["places"], False)
        pages[others] = torch.nan
    assert torch.equal(paged_attention(**given), want)
    assert want[:, 1].count_nonzero() == 0


def test_gradients_go_through():
    given = example(DOCUMENTS["tokens"])
    for name in ("q", "k_pages", "gate"):
        given[name].requires_grad_()
    leaves = [given[name] for name in ("q", "k_pages", "gate")]
    got, want = (
        torch.autograd.grad(call(**given).square().sum(), leaves)
        for call in (paged_attention, by_copying)
    )
    assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"places": torch.tensor([0, -1, 3])},
            "places has entries from -1 to 3; .* 0 to P - 1 = 4",
        ),
        ({"places": torch.tensor([0, 5, 3])}, "places has entries from 0 to 5; .* 0 to P - 1 = 4"),
        ({"places": torch.zeros(3)}, "places is torch.float32; it must be an integer"),
        ({"places": torch.tensor([0, 1])}, r"cu_seqlens_k is \[0, 3\]; it must ascend .* S = 2"),
        ({"v_pages": torch.zeros(4, HKV, C)}, r"v_pages has shape \[4, 2, 22\]; it must be"),
        ({"k_pages": torch.zeros(5, HKV, C).half()}, "k_pages has dtype torch.float16"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_what_does_not_fit_is_named(unchecked, changed, message):
    pages = torch.zeros(5, HKV, C)
    in_three = {"k_pages": pages, "v_pages": pages, "places": torch.arange(3)}
    given = example([(1, 3)]) | in_three | changed
    with pytest.raises(ValueError, match=message):
        paged_attention(**given)
