"""Rivals compute what ours does, or what they are said to."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from headwise.bench.comparison import Rival, runnable
from headwise.bench.experts import experts_only
from headwise.bench.layer import DIM, HEADS, ReleasedAttention, moh
from headwise.bench.rivals import (
    attention_of_rows,
    causal_flex_attention,
    gathered_flex_attention,
    plain_attention,
    rows_to_check,
)
from headwise.nn import MoHAttention

# The unfused form, which needs no compiler.
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def operands(length, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 16) for heads in (6, kv_heads, kv_heads))
    gate = torch.rand(2, length, 6) * (torch.rand(2, length, 6) > 0.5)
    gate[0, :, 1] = 0  # a head that is off everywhere
    gate[1, :, 2] = 0
    gate[1, -1, 2] = 1.5
    return q, k, v, gate


@unfused
@pytest.mark.parametrize(("length", "kv_heads"), [(67, 6), (131, 3), (389, 2)])
def test_flex_attention_of_all_and_of_gathered_queries(length, kv_heads):
    q, k, v, gate = operands(length, kv_heads)
    exact = plain_attention(*(x.double() for x in (q, k, v)), causal=True)
    every = causal_flex_attention(flex_attention, length, q.device)(q, k, v)
    torch.testing.assert_close(every.double(), exact, atol=1e-5, rtol=0)
    some = gathered_flex_attention(flex_attention, q, k, v, gate)
    torch.testing.assert_close(some.double(), exact * gate.unsqueeze(-1), atol=1e-5, rtol=0)
    assert (some[gate == 0] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_some_rows(causal):
    q, k, v, _ = (x.double() for x in operands(67, 3))
    rows = torch.tensor([0, 5, 66])
    whole = plain_attention(q, k, v, causal=causal)
    torch.testing.assert_close(attention_of_rows(q[:, rows], k, v, rows, causal), whole[:, rows])


def test_of_long_inputs_some_rows_are_checked():
    device = torch.device("cpu")
    assert rows_to_check(67, device).tolist() == list(range(67))
    some = rows_to_check(100_003, device)
    assert len(set(some.tolist())) == len(some) == 128


@pytest.mark.parametrize("shared", [1, 3])
def test_the_released_arithmetic_is_that_of_our_layer(shared):
    torch.manual_seed(0)
    ours = moh(0.5)
    if shared > 1:
        ours = MoHAttention(DIM, num_heads=HEADS, shared_heads=shared, active_heads=7, causal=True)
    ours = ours.double()
    x = torch.randn(2, 67, DIM, dtype=torch.float64)
    y, _ = ReleasedAttention(ours)(x)
    torch.testing.assert_close(y, ours(x)[0], atol=1e-9, rtol=0)


def test_rivals_that_do_not_run_are_named_with_the_reason():
    def fail():
        raise RuntimeError("no compiler\nand pages more")

    runs, left_out = runnable({"a": Rival(lambda: 1), "b": Rival(fail)})
    assert list(runs) == ["a"]
    assert left_out == {"b": "no compiler"}


def test_batched_mm_is_a_rival_where_few_choices_copy_little():
    from headwise.bench.comparison import Effort

    effort = Effort(torch.device("cpu"), 1, 0.0, 0, quick=False, toy=True)
    few = experts_only(effort, torch.float32, 5)
    assert list(few.rivals) == ["transformers grouped_mm", "transformers batched_mm"]
    results = [rival.run() for rival in few.rivals.values()]
    for theirs in results:
        torch.testing.assert_close(theirs, few.ours(), atol=1e-5, rtol=1e-4)
    many = experts_only(effort, torch.float32, 601)
    assert list(many.rivals) == ["transformers grouped_mm"]
    assert list(many.left_out) == ["transformers batched_mm"]
    assert "GiB" in many.left_out["transformers batched_mm"]
