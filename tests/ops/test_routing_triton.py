"""The Triton kernels of routing against torch: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from torch.testing import assert_close
from triton_device import DEVICE, RUNNABLE

from headwise.ops import route_heads, route_heads_by_query_norm, route_tokens
from headwise.ops import triton_routing as kernels

pytestmark = RUNNABLE
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _few_tokens_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "_NUMBERS", 64)


def assert_same(got, want, fields):
    for mine, field in zip(got, fields, strict=True):
        expected = getattr(want, field)
        exact = not expected.is_floating_point()
        assert_close(mine.double(), expected.double(), **{"rtol": 0, "atol": 0} if exact else CLOSE)
    assert torch.equal(got[0] != 0, want.weights != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize(
    ("heads", "shared", "top_k"),
    [(9, [0, 1], 4), (5, [1, 4], 2), (4, [], 1), (3, [0, 1], 1), (2, [0], 0)],
)
def test_queries_route_as_in_torch(heads, shared, top_k, scale_by_std, dtype):
    q = torch.randn(2, 11, heads, 24, device=DEVICE).to(dtype)
    got = kernels.query_norm_routing(q, shared, top_k, scale_by_std)
    options = {"shared_heads": shared, "top_k": top_k, "scale_by_std": scale_by_std}
    want = route_heads_by_query_norm(q.double(), **options)
    assert_same(got, want, ("weights", "indices", "probabilities", "logits"))


def test_queries_of_any_strides():
    q = torch.randn(2, 5, 11, 24, device=DEVICE).transpose(1, 2)
    views = q, q[..., ::2], torch.stack([q, q], dim=-1).unbind(-1)[0]
    for view in views:
        got = kernels.query_norm_routing(view, [0], 2, True)
        want = kernels.query_norm_routing(view.contiguous(), [0], 2, True)
        assert_close(got, want, rtol=0, atol=0)


def test_equal_norms_count_as_no_deviation_and_the_first_win():
    _, indices, probabilities, logits = kernels.query_norm_routing(
        torch.full((1, 3, 6, 16), 0.3, device=DEVICE), [0], 2, True
    )
    assert (indices == torch.tensor([0, 1], device=DEVICE)).all()
    assert_close(probabilities, torch.full_like(probabilities, 0.2))
    assert_close(logits, torch.full_like(logits, 1.2))


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize(
    ("shared", "routed", "top_k"),
    [(0, 5, 2), (1, 5, 3), (3, 5, 0), (3, 0, 0), (2, 1, 1), (2, 7, 7), (9, 64, 33)],
)
def test_two_stages_route_as_in_torch(shared, routed, top_k, mode):
    scores = 3 * torch.randn(3, 13, shared + routed + 2, device=DEVICE)
    logits = scores.split([shared, routed, 2], dim=-1)
    got = kernels.two_stage_routing(*logits, top_k, mode == "paper")
    want = route_heads(*(x.double() for x in logits), top_k=top_k, mode=mode)
    assert_same(got, want, ("weights", "indices", "probabilities"))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(96, 3), (8, 1), (5, 5), (130, 8)])
def test_tokens_route_as_in_torch(experts, top_k, normalize):
    logits = 3 * torch.randn(2, 7, 3, experts, device=DEVICE)
    got = kernels.token_routing(logits, top_k, normalize)
    want = route_tokens(logits.double(), top_k=top_k, normalize=normalize)
    assert_same(got, want, ("weights", "indices", "probabilities"))


@pytest.mark.parametrize("batch", [(0,), (1,), (2, 0, 3)])
def test_any_number_of_tokens(batch):
    logits = torch.randn(*batch, 8, device=DEVICE)
    weights, indices, probabilities = kernels.token_routing(logits, 2, True)
    assert weights.shape == indices.shape == (*batch, 2)
    assert probabilities.shape == logits.shape
    assert kernels.two_stage_routing(logits, logits, logits[..., :2], 2, False)[0].shape == (
        *batch,
        16,
    )


# The interpreter computes by numpy, which warns.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ties_go_to_the_lowest_index_and_what_is_no_number_to_an_expert_that_exists():
    logits = torch.zeros(3, 9, device=DEVICE)
    assert (kernels.token_routing(logits, 4, True)[1] == torch.arange(4, device=DEVICE)).all()
    _, indices, _ = kernels.token_routing(logits / 0, 4, True)
    assert ((indices >= 0) & (indices < 9)).all()
