"""The C++ kernels: built here, then compared with the reference in float64."""

import itertools

import pytest
import torch
from cases import assert_at_most_twice, value_and_gradients
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import head_attention
from headwise.ops.attention import choose
from headwise.ops.native import attention as native
from headwise.ops.native.decode import native_decode
from headwise.ops.plain_attention import Operands, attend_all

pytestmark = pytest.mark.usefixtures("native_kernels")
# The reference in plain PyTorch, dense, is compared with that of loops in other tests.
SIZES = {
    "plain": {"T": 37, "S": 41},
    "causal": {"T": 13, "S": 13, "causal": True},
    "more keys": {"T": 5, "S": 67, "causal": True},
    "fewer keys": {"T": 67, "S": 5, "causal": True},
    "one token": {"T": 1, "S": 1, "causal": True},
    "groups": {"T": 31, "S": 31, "H": 6, "kv_heads": 2, "causal": True},
    "one head of keys": {"T": 31, "S": 37, "H": 5, "kv_heads": 1},
    "several blocks": {"T": 409, "S": 409, "causal": True},
    "several steps": {"T": 67, "S": 1201, "causal": True, "kv_heads": 1},
    "several steps, full": {"T": 151, "S": 1201},
    "all on": {"T": 43, "S": 43, "on": 1},
    "few on": {"T": 43, "S": 43, "on": 0.05, "causal": True},
    "scale": {"T": 13, "S": 13, "scale": 0.5},
    "negative scale": {"T": 67, "S": 67, "scale": -3.0, "causal": True},
}


def arguments(T=5, S=5, H=3, kv_heads=3, C=22, on=0.6, dtype=torch.float32):
    q = torch.randn(2, T, H, C).to(dtype)
    k, v = (torch.randn(2, S, kv_heads, C).to(dtype) for _ in range(2))
    gate = torch.rand(2, T, H) + 0.1
    gate[torch.rand(2, T, H) > on] = 0
    return {"q": q, "k": k, "v": v, "gate": gate}


def computed(tensors, impl, dtype=torch.float32, **options):
    wide = {n: x.detach().to(dtype).requires_grad_() for n, x in tensors.items() if n != "gate"}
    gate = tensors["gate"].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    own = wide | {"gate": gate}
    return value_and_gradients(head_attention(**own, impl=impl, **options), own)


def arguments_of(size, **changes):
    """Tensors of a size, and its options."""
    given = SIZES[size] | changes
    options = {name: given.pop(name) for name in ("causal", "scale") if name in given}
    return arguments(**given), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_that_of_plain_attention(size, dtype):
    tensors, options = arguments_of(size, dtype=dtype)
    ours, plain = (computed(tensors, impl, dtype, **options) for impl in ("native", "dense"))
    exact = computed(tensors, "dense", torch.float64, **options)
    assert_at_most_twice(ours, plain, exact, torch.finfo(dtype).eps / 2 * exact["y"].norm())


@pytest.mark.parametrize("operand", ["q", "k", "v", "gate"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_a_number_stays_so(size, operand):
    """Also in the kernel for few rows, whose sum of weights must not take it for nothing seen."""
    tensors, options = arguments_of(size)
    # The last token sees the first key in all cases.
    tensors["gate"][:, -1] = 1
    tensors[operand][0, 0 if operand in ("k", "v") else -1] = torch.nan
    with torch.no_grad():
        expected = head_attention(**tensors, impl="reference", **options).isnan()
        actual = head_attention(**tensors, impl="native", **options).isnan()
    assert expected.any()
    assert actual[expected].all()


def test_keys_of_a_head_that_nobody_selected_get_no_gradient():
    tensors = arguments(T=31, S=31)
    tensors["gate"][:, :, 1] = 0
    assert all((x[:, :, 1] == 0).all() for x in computed(tensors, "native", causal=True).values())


def test_a_skewed_router_and_padding():
    tensors = arguments(T=301, S=301, on=0.1)
    tensors["gate"][:, :, 0] = 0.7
    tensors["gate"][1, 20:] = 0
    got = computed(tensors, "native", causal=True)
    want = computed(tensors, "dense", torch.float64, causal=True)
    assert_close(got, want, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_layouts_that_are_not_contiguous():
    tensors = arguments(T=31, S=31)
    want = computed(tensors, "native")["y"]
    moved = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tensors.items()}
    assert_close(head_attention(**moved, impl="native"), want)


def test_a_value_of_a_later_token_changes_nothing():
    tensors = arguments(T=301, S=301)
    before = head_attention(**tensors, causal=True, impl="native")
    tensors["v"][:, 200:] = 1e4
    after = head_attention(**tensors, causal=True, impl="native")
    assert torch.equal(before[:, :200], after[:, :200])


def test_processors_with_tiles_have_torch_compute_nearly_all_heads_in_bfloat16(monkeypatch):
    monkeypatch.setattr(native, "_HAS_TILES", True)
    tensors = arguments(T=31, S=31, on=1, dtype=torch.bfloat16)
    q, k, v, gate = tensors.values()
    want, _ = attend_all(Operands(q, k, v, gate, causal=True, scale=22**-0.5))
    with torch.no_grad():
        assert torch.equal(head_attention(**tensors, causal=True, impl="native"), want)


# Masks [B|1, H|1, T|1, S|1] and more, all with several blocks of rows or steps of keys.
SEEN = {
    "padding on the right": lambda t, s: {"mask": (torch.arange(s) < s - 37).expand(2, 1, t, s)},
    "padding on the left": lambda t, s: {"mask": (torch.arange(s) >= 41).expand(2, 1, 1, s)},
    "one batch entry padded": lambda t, s: {
        "mask": torch.stack([torch.arange(s) < s - 300, torch.ones(s, dtype=torch.bool)])[
            :, None, None
        ]
    },
    "holes": lambda t, s: {"mask": torch.rand(2, 3, t, s) < 0.3},
    "holes for all heads": lambda t, s: {"mask": torch.rand(1, 1, t, s) < 0.01},
    "blocks": lambda t, s: {
        "mask": (torch.rand(2, 1, -(-t // 64), -(-s // 256)) < 0.5)
        .repeat_interleave(64, 2)[:, :, :t]
        .repeat_interleave(256, 3)[..., :s]
    },
    "nothing": lambda t, s: {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
    "bias": lambda t, s: {"bias": 3 * torch.randn(2, 3, t, s)},
    "bias of keys, causal": lambda t, s: {"bias": torch.randn(3, 1, s), "causal": True},
    "bias that hides": lambda t, s: {
        "bias": torch.where(torch.rand(2, 1, t, s) < 0.1, 0.7, float("-inf"))
    },
    "bias that hides all": lambda t, s: {"bias": torch.full((1, 1, t, 1), float("-inf"))},
    "bias and holes": lambda t, s: {
        "bias": torch.randn(1, 1, t, s), "mask": torch.rand(2, 1, t, s) < 0.5, "causal": True
    },
    "window": lambda t, s: {"window": 53, "causal": True},
    "window on both sides": lambda t, s: {"window": 101},
    "window of one": lambda t, s: {"window": 1, "causal": True},
    "wide window": lambda t, s: {"window": 10_000, "causal": True},
    "window and padding": lambda t, s: {
        "window": 53, "causal": True, "mask": (torch.arange(s) >= 300).expand(1, 1, t, s)
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", SEEN)
def test_what_is_not_seen_is_as_far_from_float64_as_in_plain_attention(what, dtype):
    tensors = arguments(T=331, S=563, dtype=dtype)
    options = SEEN[what](331, 563)
    ours, plain = (computed(tensors, impl, dtype, **options) for impl in ("native", "gathered"))
    exact = computed(tensors, "dense", torch.float64, **options)
    if what in ("nothing", "bias that hides all"):
        exact = {name: torch.zeros_like(x) for name, x in exact.items()}
    floor = torch.finfo(dtype).eps / 2 * exact["y"].norm()
    assert_at_most_twice(ours, plain, exact, floor)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
def test_documents_in_a_row_are_as_if_each_were_alone(causal, window):
    lengths = [1, 130, 0, 64, 300, 2]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {name: x[:1].requires_grad_() for name, x in arguments(T=497, S=497).items()}
    dy = torch.randn_like(tensors["q"])
    y = head_attention(**tensors, impl="native", causal=causal, window=window, cu_seqlens=edges)
    packed = torch.autograd.grad(y, tensors.values(), dy)
    documents = [slice(first, last) for first, last in itertools.pairwise(edges)]
    own = [
        head_attention(
            **{name: x[:, rows].double() for name, x in tensors.items()},
            impl="dense", causal=causal, window=window,
        )
        for rows in documents
    ]  # fmt: skip
    alone = torch.cat(own, dim=1)
    assert_close(y.double(), alone, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(alone, tensors.values(), dy.double())
    assert_close(packed, gradients, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("impl", ["native", "gathered", "dense", "reference"])
def test_documents_may_have_other_keys_than_queries(impl):
    """As in continuous batching: one asks with 3 tokens after 4 in its cache, one with 2 of 2."""
    tensors = arguments(T=5, S=9)
    tensors = {name: x[:1] for name, x in tensors.items()}
    y = head_attention(
        **tensors, causal=True, impl=impl,
        cu_seqlens=torch.tensor([0, 3, 5]), cu_seqlens_k=torch.tensor([0, 7, 9]),
    )  # fmt: skip
    for rows, keys in ((slice(0, 3), slice(0, 7)), (slice(3, 5), slice(7, 9))):
        own = {n: x[:, keys if n in "kv" else rows] for n, x in tensors.items()}
        assert_close(y[:, rows], head_attention(**own, causal=True, impl="reference"))


@pytest.mark.parametrize("mask", ["causal", "padding", "window", "documents"])
def test_what_is_not_seen_is_not_read(mask):
    """A NaN among keys that nobody sees, in a block of its own, changes nothing."""
    tensors = arguments(T=1024, S=1024)
    tensors = {name: x[:1] for name, x in tensors.items()}
    options = {
        "causal": {"causal": True},
        "padding": {"mask": (torch.arange(1024) < 512).expand(1, 1, 1024, 1024)},
        "window": {"window": 100, "causal": True},
        "documents": {"cu_seqlens": torch.tensor([0, 512, 1024])},
    }[mask]
    tensors["gate"][:, 512:] = 0
    tensors["k"][:, 512:] = torch.nan
    tensors["v"][:, 512:] = torch.nan
    tensors["gate"][:, :512] = 1
    got = computed(tensors, "native", **options)
    assert got["y"].isfinite().all()
    assert got["q"].isfinite().all()
    assert got["k"][:, :512].isfinite().all()
    assert got["gate"].isfinite().all()


DECODED = {
    "one token": {"S": 67},
    "one key": {"S": 1},
    "several pieces": {"S": 1203},
    "groups": {"S": 131, "H": 6, "kv_heads": 2},
    "several tokens": {"T": 4, "S": 601, "causal": True, "H": 4, "kv_heads": 2},
    "fewer keys than tokens": {"T": 5, "S": 3, "causal": True},
    "all on": {"S": 67, "on": 1},
    "none on": {"S": 67, "on": 0},
    "padding": {"S": 67, "mask": (2, 1, 1, 67)},
    "a mask for each head and token": {"T": 3, "S": 601, "mask": (1, 3, 3, 601)},
    "nothing seen": {"S": 67, "mask": (2, 3, 1, 67), "seen": 0},
    "bias": {"T": 2, "S": 1203, "bias": (1, 3, 1, 1203), "causal": True},
    "window": {"T": 3, "S": 1203, "window": 600, "causal": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", DECODED)
def test_decoding_has_at_most_twice_the_error_of_plain_attention(size, dtype):
    given = {"T": 1} | DECODED[size]
    options = {"causal": given.pop("causal", False)}
    if "window" in given:
        options["window"] = given.pop("window")
    if "bias" in given:
        options["bias"] = torch.randn(given.pop("bias"))
    if "mask" in given:
        options["mask"] = torch.rand(given.pop("mask")) < given.pop("seen", 0.7)
    tensors = arguments(**given, dtype=dtype)
    assert choose(Operands(**tensors)).decoding
    got = head_attention(**tensors, **options, impl="native")
    plain = head_attention(**tensors, **options, impl="dense")
    exact = head_attention(**{n: x.double() for n, x in tensors.items()}, **options, impl="dense")
    floor = torch.finfo(dtype).eps / 8 * exact.norm()
    assert_at_most_twice({"y": got}, {"y": plain}, {"y": exact}, floor)
    assert (got[tensors["gate"] == 0] == 0).all()


def test_decoding_reads_caches_of_any_layout():
    tensors = arguments(T=1, S=67)
    want = head_attention(**tensors, impl="native")
    for name in ("k", "v"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(head_attention(**tensors, impl="native"), want)


def test_auto_takes_it_where_it_is_built():
    tensors = arguments(T=1024, S=1024)
    assert choose(Operands(**tensors)) == ("native", False, False)
    mask = torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    assert choose(Operands(**tensors, mask=mask)).impl == "native"
    learned = torch.zeros(1, 1, 1, 1024, requires_grad=True)
    assert choose(Operands(**tensors, bias=learned)).impl == "gathered"
    wide = {name: x.double() for name, x in tensors.items()}
    assert choose(Operands(**wide)).impl == "gathered"
    short = arguments(T=100, S=100)
    assert choose(Operands(**short)).impl == "dense"
    few = arguments(T=1, S=5)
    assert choose(Operands(**few)) == ("native", True, False)
    few["q"].requires_grad_()
    assert choose(Operands(**few)) == ("dense", False, True)


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float64}, {"C": 21}], ids=["float64", "odd channels"]
)
def test_what_it_does_not_take_is_named(changes):
    with pytest.raises(ValueError, match=r"impl .native. takes float32 and bfloat16.*gathered"):
        head_attention(**arguments(**changes), impl="native")


def test_custom_op_contract():
    q, k, v, gate = (x.requires_grad_() for x in arguments(kv_heads=1).values())
    spans = torch.tensor([[0, t + 1] for t in range(5)], dtype=torch.int32)[None]
    mask, bias = torch.rand(2, 1, 5, 5) < 0.7, torch.randn(1, 3, 5, 5)
    for seen in ((None, None, None), (spans, mask, bias)):
        torch.library.opcheck(native.native_attention, (q, k, v, gate, True, *seen, 0.3, 2.0))
    few = [x.detach() for x in (q[:, :2], k, v, gate[:, :2])]
    torch.library.opcheck(native_decode, (*few, True, None, None, None, 0.3))


def test_flops_count_the_rows_that_are_on():
    tensors = arguments(on=1)
    tensors["gate"][:, :3] = 0
    q = tensors["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        head_attention(**tensors, causal=True, impl="native").sum().backward()
    assert q.grad is not None
    assert counter.get_total_flops() == 4 * 22 * 2 * 3 * (4 + 5) * 7 // 2


def test_flops_of_a_decode_step_count_the_heads_that_are_on():
    tensors = arguments(T=1, S=11, on=1)
    tensors["gate"][0, :, 1:] = 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head_attention(**tensors, causal=True, impl="native")
    assert counter.get_total_flops() == 4 * 22 * (1 + 3) * 11


@pytest.mark.parametrize(("limit", "heads"), [(0.5, 3), (0.7, 2), (2.0, 2)])
def test_flops_count_all_heads_where_torch_computes_them(limit, heads):
    q, k, v, gate = arguments(T=7, S=7, on=1).values()
    gate[:, :, 0] = 0  # two heads of three
    with FlopCounterMode(display=False) as counter:
        native.native_attention(q, k, v, gate, False, None, None, None, 0.3, limit)
    assert counter.get_total_flops() == 4 * 22 * 2 * heads * 7 * 7
