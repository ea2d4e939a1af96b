"""The C++ kernels of aggregated attention: built here, then compared with float64."""

import pytest
import torch
from cases import OVER_CHANNELS, assert_at_most_twice, map_of, threads, value_and_gradients
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import aggregated_attention
from headwise.ops.aggregated import choose
from headwise.ops.native.aggregated import native_aggregated_attention

pytestmark = pytest.mark.usefixtures("native_kernels")
SIZES = {
    "plain": {},
    "channels of TransNeXt": {"channels": 24},
    "more channels": {"channels": 66},
    "window of one": {"window": 1},
    "wide window": {"window": 5},
    "window larger than the map": {"size": (2, 3), "window": 7},
    "one row": {"size": (1, 31)},
    "one token": {"size": (1, 1), "pooled": 1},
    "nothing pooled": {"pooled": 0, "channels": 24},
    "many pooled": {"pooled": 67},
    "several blocks": {"size": (17, 19), "channels": 24},
    "many heads": {"heads": 11},
    "one image": {"batch": 1},
    "all on": {"on": 1},
    "few on": {"on": 0.05},
}


def case(
    size=(5, 7), window=3, pooled=11, heads=3, channels=10, on=0.6, batch=5, dtype=torch.float32
):
    """Tensors of a call, those with channels in `dtype`, and its options."""
    tensors, options = map_of(size, window, pooled, heads, channels, on, batch)
    return tensors | {name: tensors[name].to(dtype) for name in OVER_CHANNELS}, options


def computed(tensors, options, impl, dtype=torch.float32):
    """Parameters and gates are never narrower than float32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.detach().to(dtype if name in OVER_CHANNELS else wide).requires_grad_()
        for name, x in tensors.items()
    }
    return value_and_gradients(aggregated_attention(**leaves, **options, impl=impl), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_error_is_at_most_twice_that_of_plain_pytorch(name, dtype):
    tensors, options = case(**SIZES[name], dtype=dtype)
    ours, plain = (computed(tensors, options, impl, dtype) for impl in ("native", "dense"))
    exact = computed(tensors, options, "dense", torch.float64)
    assert_at_most_twice(ours, plain, exact, torch.finfo(dtype).eps / 8 * exact["y"].norm())


def test_what_is_off_gives_nothing_and_gets_no_gradient():
    tensors, options = case()
    tensors["gate"][:, :, 1] = 0
    off = tensors["gate"] == 0
    found = computed(tensors, options, "native")
    assert all((found[name][off] == 0).all() for name in ("y", "q", "unit_q", "gate"))
    assert all((found[name][:, :, 1] == 0).all() for name in ("k", "v", "k_pool", "v_pool"))
    parameters = ("local_bias", "pool_bias", "learned_tokens", "learned_bias")
    assert all((found[name][1] == 0).all() for name in parameters)


def test_what_is_off_is_not_read():
    tensors, options = case()
    before = aggregated_attention(**tensors, **options, impl="native")
    for name in ("q", "unit_q"):
        tensors[name][tensors["gate"] == 0] = float("nan")
    assert torch.equal(aggregated_attention(**tensors, **options, impl="native"), before)


def test_gradients_are_the_same_each_time_and_nearly_so_for_more_threads():
    tensors, options = case(size=(11, 13), heads=5)
    once, again = (computed(tensors, options, "native") for _ in range(2))
    assert_close(again, once, rtol=0, atol=0)
    with threads(3):
        assert_close(computed(tensors, options, "native"), once, rtol=1e-4, atol=1e-4)


def test_layouts_that_are_not_contiguous():
    tensors, options = case()
    want = aggregated_attention(**tensors, **options, impl="native")
    # Keys and values side by side, as one projection gives them.
    for names in (("k", "v"), ("k_pool", "v_pool")):
        both = torch.stack([tensors[name] for name in names], dim=2)
        tensors |= dict(zip(names, both.unbind(2), strict=True))
    tensors["learned_tokens"] = tensors["learned_tokens"].mT.contiguous().mT
    assert torch.equal(aggregated_attention(**tensors, **options, impl="native"), want)


def test_auto_takes_it_where_it_is_built():
    tensors, _ = case()
    assert choose(tensors["q"]) == "native"
    assert choose(tensors["q"].double()) == "dense"


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float64}, {"channels": 11}], ids=["float64", "odd channels"]
)
def test_what_it_does_not_take_is_named(changes):
    tensors, options = case(**changes)
    with pytest.raises(ValueError, match=r"impl .native. takes float32 and bfloat16.*dense"):
        aggregated_attention(**tensors, **options, impl="native")


def test_custom_op_contract():
    tensors, _ = case(size=(2, 3), pooled=2, batch=1)
    leaves = [x.requires_grad_() for x in tensors.values()]
    torch.library.opcheck(native_aggregated_attention, (*leaves, 2, 3, 3))


def test_flops_count_what_is_on_and_inside_the_map():
    tensors, options = case(size=(2, 3), on=1, batch=2)
    tensors["gate"][1] = 0
    q = tensors["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = aggregated_attention(**tensors, **options, impl="native")
        near, far = 3 * (4 * 4 + 2 * 6), 3 * 6 * 11  # 3 heads; corners see 4 positions
        assert counter.get_total_flops() == 2 * 10 * (3 * near + 2 * far)
        y.sum().backward()
    assert q.grad is not None
    assert counter.get_total_flops() == 2 * 10 * (11 * near + 7 * far)
