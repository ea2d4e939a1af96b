"""The C++ kernels: built here, then compared with the reference in float64."""

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
    "plain": {"T": 7, "S": 11},
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
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", DECODED)
def test_decoding_has_at_most_twice_the_error_of_plain_attention(size, dtype):
    given = {"T": 1} | DECODED[size]
    options = {"causal": given.pop("causal", False)}
    if "mask" in given:
        options["mask"] = torch.rand(given.pop("mask")) < given.pop("seen", 0.7)
    tensors = arguments(**given, dtype=dtype)
    assert choose(Operands(**tensors, **options)).impl == "native"
    got = head_attention(**tensors, **options)
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
    assert choose(Operands(**tensors, mask=mask)).impl == "gathered"
    wide = {name: x.double() for name, x in tensors.items()}
    assert choose(Operands(**wide)).impl == "gathered"
    short = arguments(T=100, S=100)
    assert choose(Operands(**short)).impl == "dense"
    few = arguments(T=1, S=5)
    assert choose(Operands(**few)) == ("native", True, False)
    assert choose(Operands(**few, bias=torch.zeros(5))).impl == "dense"
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
    torch.library.opcheck(native.native_attention, (q, k, v, gate, True, 0.3, 2.0))
    few = [x.detach() for x in (q[:, :2], k, v, gate[:, :2])]
    torch.library.opcheck(native_decode, (*few, True, 0.3, None))


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
        native.native_attention(q, k, v, gate, False, 0.3, limit)
    assert counter.get_total_flops() == 4 * 22 * 2 * heads * 7 * 7
