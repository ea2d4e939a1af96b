"""Every implementation of head_attention against the reference: values, gradients, accuracy."""

import pytest
import torch
from cases import assert_at_most_twice, plain_attention, threads, value_and_gradients, where_on
from cases import leaves as leaves_of
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import head_attention
from headwise.ops.attention import Operands, _torch_is_faster, gathered, pieces, ragged

B, C = 2, 11
# The share of heads that may be on for "gathered" to gather: always, never, and in small parts.
ALWAYS, NEVER = 2.0, 0.0


@pytest.fixture(params=["dense", "gathered", "gathered in small parts", "gathered, whole"])
def impl(request, monkeypatch):
    """An implementation; what it decides by size is decided here, so that small inputs do."""
    name, _, how = request.param.partition(" ")
    share = NEVER if how == "whole" else ALWAYS
    monkeypatch.setattr(gathered, "largest_share", lambda *_: share)
    if how == "in small parts":
        make_parts_small(monkeypatch)
    return name.rstrip(",")


def make_parts_small(monkeypatch):
    monkeypatch.setattr(ragged, "_EDGE_ROWS", 2)
    monkeypatch.setattr(ragged, "_MASKED_ROWS", 2)
    monkeypatch.setattr(ragged, "_SLACK_ROWS", 1)
    monkeypatch.setattr(ragged, "_ROW_MULTIPLE", 3)
    monkeypatch.setattr(pieces, "_ROW_BLOCK", 1)
    monkeypatch.setattr(pieces, "_KEY_BLOCK", 2)


def case(T=5, S=7, H=3, kv_heads=3, on=0.6, mask=None, bias=None, **options):
    """Leaf tensors (all gradients wanted) and the options of a call, in float64."""
    q = torch.randn(B, T, H, C, dtype=torch.float64)
    k, v = (torch.randn(B, S, kv_heads, C, dtype=torch.float64) for _ in range(2))
    gate = torch.rand(B, T, H, dtype=torch.float64) + 0.1
    gate[torch.rand(B, T, H) > on] = 0
    leaves = {"q": q, "k": k, "v": v, "gate": gate}
    if bias is not None:
        leaves["bias"] = torch.randn(bias, dtype=torch.float64)
    if mask is not None:
        options["mask"] = torch.rand(mask) > 0.4
        options["mask"][..., -1, :] = False
    return {name: x.requires_grad_() for name, x in leaves.items()}, options


CASES = {
    "plain": {},
    "grouped": {"H": 6, "kv_heads": 2},
    "causal": {"T": 5, "S": 5, "causal": True},
    "causal, more keys": {"T": 5, "S": 7, "causal": True, "kv_heads": 1},
    "causal, fewer keys": {"T": 7, "S": 5, "causal": True},
    "mask": {"mask": (B, 3, 5, 7)},
    "mask of keys": {"mask": (B, 1, 5, 7), "scale": 0.7},
    "bias": {"bias": (1, 3, 5, 7)},
    "bias without batch": {"bias": (5, 7)},
    "everything": {
        "mask": (B, 1, 5, 7), "bias": (B, 3, 1, 7), "causal": True, "kv_heads": 1, "scale": 0.2
    },
    "one token": {"T": 1, "S": 1, "causal": True},
    "one query": {"T": 1, "S": 13, "causal": True},
    "all on": {"on": 1},
    "few on": {"on": 0.1, "T": 11},
    "long": {"T": 37, "S": 41, "H": 6, "kv_heads": 3, "causal": True},
    "long, full": {"T": 37, "S": 41, "H": 6, "kv_heads": 3},
    "long, one head of keys": {"T": 41, "S": 41, "H": 3, "kv_heads": 1, "causal": True},
}  # fmt: skip


def computed(leaves, options, impl):
    return value_and_gradients(head_attention(**leaves, **options, impl=impl), leaves)


def assert_equal_to_the_reference(leaves, options, impl):
    got, want = (computed(leaves, options, name) for name in (impl, "reference"))
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    off = leaves["gate"] == 0
    assert all((x[name][off] == 0).all() for x in (got, want) for name in ("y", "q", "gate"))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_values_and_all_gradients(name, impl):
    assert_equal_to_the_reference(*case(**CASES[name]), impl)


@pytest.mark.parametrize("bias", [False, True])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(impl, bias):
    leaves, _ = case(on=1, bias=(5, 7) if bias else None)
    mask = torch.ones(B, 1, 5, 7, dtype=torch.bool)
    mask[1, :, 3] = False
    found = computed(leaves, {"mask": mask}, impl)
    assert all((found[name][1, 3] == 0).all() for name in ("y", "q", "gate"))
    assert all(x.isfinite().all() for x in found.values())


def test_keys_and_values_of_a_head_that_nobody_selected_get_no_gradient(impl):
    leaves, options = case()
    with torch.no_grad():
        leaves["gate"][:, :, 1] = 0
    found = computed(leaves, options, impl)
    assert all((found[name][:, :, 1] == 0).all() for name in "kv")


def test_one_head_chosen_by_all(impl):
    leaves, options = case(causal=True, S=5)
    with torch.no_grad():
        leaves["gate"].zero_()[:, :, 2] = 0.7
    assert_equal_to_the_reference(leaves, options, impl)


def test_all_heads_off_gives_zero(impl):
    leaves, options = case()
    with torch.no_grad():
        leaves["gate"].zero_()
    assert (head_attention(**leaves, **options, impl=impl) == 0).all()


def test_no_keys_gives_zero(impl):
    leaves, options = case(S=0)
    assert (head_attention(**leaves, **options, impl=impl) == 0).all()


def test_gradcheck(impl):
    leaves, options = case(T=2, S=3, H=2, kv_heads=1, mask=(2, 3), bias=(2, 3), causal=True)
    pattern = (leaves["gate"] != 0).double()
    with torch.no_grad():
        leaves["gate"] += 0.5

    def call(q, k, v, gate, bias):
        return head_attention(q, k, v, gate * pattern, bias=bias, **options, impl=impl)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_at_most_twice_that_of_plain_attention(impl, dtype, causal):
    leaves, _ = case(T=31, S=31, causal=causal)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    results = (
        computed(leaves, {"causal": causal}, impl), plain_attention(leaves, causal),
        computed(wide, {"causal": causal}, "dense"),
    )  # fmt: skip
    assert_at_most_twice(*(where_on(found, leaves["gate"]) for found in results))


@pytest.mark.parametrize("causal", [False, True])
def test_shared_heads_and_a_skewed_router(impl, causal):
    leaves, options = case(T=43, S=43, H=5, kv_heads=5, causal=causal)
    with torch.no_grad():
        gate = leaves["gate"]
        gate[:, :, 0] = 1.3  # shared
        gate[:, 1::2, 1] = 0.4  # half of the tokens
        gate[1, 20:] = 0  # padding
    assert_equal_to_the_reference(leaves, options, impl)


@pytest.mark.parametrize("layout", ["heads first", "sliced"])
def test_layouts_that_are_not_contiguous(impl, layout):
    leaves, options = case(T=7, causal=True)
    want = computed(leaves, options, "reference")["y"]
    for name in ("q", "k", "v"):
        x = leaves[name].detach()
        if layout == "heads first":
            leaves[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            leaves[name] = torch.stack([x, -x], dim=3)[:, :, :, 0]
    assert_close(head_attention(**leaves, **options, impl=impl), want)


DECODED = ["one query", "causal, more keys", "mask", "bias", "everything", "grouped", "all on"]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", DECODED)
def test_decode_equals_the_reference(name, number):
    leaves, options = case(**CASES[name])
    with threads(number), torch.no_grad():
        got = head_attention(**leaves, **options, impl="decode")
        want = head_attention(**leaves, **options, impl="reference")
    assert_close(got, want)


def test_decode_does_not_read_a_group_that_is_off():
    leaves, _ = case(T=1, H=6, kv_heads=3)
    with torch.no_grad():
        leaves["gate"][0, :, 2:4] = 0
        leaves["gate"][1, :, 4:] = 0
        for name in ("k", "v"):
            leaves[name][0, :, 1] = torch.nan
            leaves[name][1, :, 2] = torch.nan
        assert head_attention(**leaves, impl="decode").isfinite().all()


def test_flops_of_decode_count_the_key_heads_that_are_read():
    leaves, _ = case(T=2, S=11, H=6, kv_heads=3, on=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        leaves["gate"][0, :, 2:4] = 0  # the second key head
        leaves["gate"][1, :, 5] = 0  # half of the third, which is computed whole
        head_attention(**leaves, impl="decode")
    rows = 2 * 2 * (2 + 3)  # tokens, query heads of a key head, key heads of both entries
    assert counter.get_total_flops() == 4 * C * rows * 11


def test_decode_refuses_gradients():
    leaves, _ = case(T=1)
    with pytest.raises(ValueError, match=r"impl is .decode., which has no backward"):
        head_attention(**leaves, impl="decode")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_custom_op_contract(monkeypatch, causal, whole):
    monkeypatch.setattr(gathered, "largest_share", lambda *_: NEVER if whole else ALWAYS)
    leaves, _ = case(T=7, S=7, kv_heads=1, bias=(1, 3, 7, 7))
    q, k, v, gate, bias = leaves.values()
    arguments = (q, k, v, gate, causal, None, bias, 0.3)
    torch.library.opcheck(gathered.gathered_attention, arguments)


def test_flops_count_the_rows_that_are_on(monkeypatch):
    leaves, _ = case(T=5, S=5, on=1)
    with torch.no_grad():
        leaves["gate"][:, :3] = 0  # the last two tokens stay: they see 4 and 5 keys
    for share, pairs in ((ALWAYS, B * 3 * (4 + 5)), (NEVER, B * 3 * 15)):
        monkeypatch.setattr(gathered, "largest_share", lambda *_, share=share: share)
        with FlopCounterMode(display=False) as counter:
            y = head_attention(**leaves, causal=True, impl="gathered")
            y.sum().backward()
        assert counter.get_total_flops() == 4 * C * pairs * 7 // 2


@pytest.mark.parametrize(
    ("channels", "share", "changes", "faster"),
    [
        (64, 1.0, {}, False),
        (128, 0.75, {}, False),
        (128, 0.8, {}, True),
        (128, 1.0, {"causal": False}, True),
        (128, 1.0, {"keys": 11}, False),
        (128, 1.0, {"mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, False),
    ],
)
def test_on_a_gpu_wide_heads_that_are_nearly_all_on_are_torchs(channels, share, changes, faster):
    options = {"causal": True, "keys": 7} | changes
    q, k = torch.zeros(1, 7, 2, channels), torch.zeros(1, options.pop("keys"), 2, channels)
    assert _torch_is_faster(Operands(q, k, k, torch.ones(1, 7, 2), **options), share) is faster


@pytest.mark.parametrize("on", [0.5, 1])
def test_large_scores_leave_all_gradients_finite(on):
    """Rows that fill up a tile once had the log-sum-exp of another row, and overflowed."""
    q, k, v = (torch.randn(1, 512, 8, 64) for _ in range(3))
    gate = (torch.rand(1, 512, 8) < on).float()
    mask = torch.ones(512, 512, dtype=torch.bool).tril()
    found = computed(
        leaves_of({"q": q * 60, "k": k, "v": v, "gate": gate}), {"mask": mask}, "gathered"
    )
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_that_are_apart_in_memory(impl, dtype, causal):
    """torch's own kernel, asked without its wrapper, takes them to lie side by side."""
    q, k, v = torch.randn(B, 37, 5, C, 3, dtype=dtype).unbind(-1)
    gate = (torch.rand(B, 37, 5) < 0.5).to(dtype)
    tensors = {"q": q, "k": k, "v": v, "gate": gate}
    apart, together = (
        leaves_of(given)
        for given in (tensors, {name: x.clone().contiguous() for name, x in tensors.items()})
    )
    got, want = (computed(given, {"causal": causal}, impl) for given in (apart, together))
    tolerance = 0.02 if dtype == torch.bfloat16 else None
    assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_decoding_from_a_cache_whose_channels_are_apart():
    k, v = torch.randn(B, 41, 3, C, 2).unbind(-1)
    q, gate = torch.randn(B, 1, 3, C, 2).unbind(-1)[0], torch.ones(B, 1, 3)
    got = head_attention(q, k, v, gate, impl="decode")
    want = head_attention(*(x.contiguous() for x in (q, k, v)), gate, impl="decode")
    assert_close(got, want)


@pytest.mark.parametrize(("size", "scale"), [(1, -0.7), (100, -0.7), (1, 0.0)])
def test_a_scale_that_is_not_positive(impl, size, scale):
    leaves, _ = case(T=31, S=37, causal=True)
    with torch.no_grad():
        leaves["q"] *= size
    assert_equal_to_the_reference(leaves, {"causal": True, "scale": scale}, impl)
