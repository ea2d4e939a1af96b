"""Each argument of each public op replaced by what it must not be: a ValueError, never a crash."""

from functools import partial

import pytest
import torch

from headwise.ops import (
    aggregated_attention,
    expert_mlp,
    head_attention,
    route_heads,
    route_heads_by_query_norm,
    route_tokens,
)
from headwise.ops.attention import Impl as HeadImpl
from headwise.ops.experts import Impl as ExpertImpl
from headwise.ops.head_projection import merge_heads, project_heads

B, T, S, H, G, C, N, D, E, K, F = 2, 5, 7, 6, 3, 14, 13, 10, 11, 3, 22
HEADS = {
    "q": torch.randn(B, T, H, C), "k": torch.randn(B, S, G, C), "v": torch.randn(B, S, G, C),
    "gate": torch.ones(B, T, H),
}  # fmt: skip
SCORED = {"mask": torch.ones(T, S, dtype=torch.bool), "bias": torch.zeros(H, T, S)}
EXPERTS = {
    "x": torch.randn(N, D), "weights": torch.rand(N, K), "indices": torch.randint(E, (N, K)),
    "up_proj": torch.randn(E, 2 * F, D), "down_proj": torch.randn(E, D, F),
}  # fmt: skip
LOGITS = {
    "shared_logits": torch.randn(N, 2), "routed_logits": torch.randn(N, 5),
    "stage_logits": torch.randn(N, 2),
}  # fmt: skip
MAP = {
    **{name: torch.randn(B, 15, H, C) for name in ("q", "k", "v", "unit_q")},
    **{name: torch.randn(B, 4, H, C) for name in ("k_pool", "v_pool")},
    "gate": torch.ones(B, 15, H), "local_bias": torch.zeros(H, 9),
    "pool_bias": torch.zeros(H, 15, 4), "learned_tokens": torch.zeros(H, C, 9),
    "learned_bias": torch.zeros(H, 9),
}  # fmt: skip
# What is called, and arguments with which it works.
CALLS = {
    "head_attention": (head_attention, HEADS),
    "head_attention with mask and bias": (head_attention, HEADS | SCORED),
    "head_attention, decode": (
        partial(head_attention, impl="decode"), HEADS | {"mask": SCORED["mask"]}
    ),
    "expert_mlp": (expert_mlp, EXPERTS),
    "route_heads": (partial(route_heads, top_k=3), LOGITS),
    "route_heads, sparsemax": (partial(route_heads, top_k=3, scores="sparsemax"), LOGITS),
    "route_heads_by_query_norm": (
        partial(route_heads_by_query_norm, shared_heads=1, top_k=2), {"q": HEADS["q"]}
    ),
    "route_tokens": (
        partial(route_tokens, top_k=2), {"logits": torch.randn(N, E), "bias": torch.zeros(E)}
    ),
    "project_heads": (
        project_heads,
        {"x": torch.randn(B, T, D), "weight": torch.randn(H * C, D), "bias": torch.zeros(H * C),
         "gate": HEADS["gate"]},
    ),
    "merge_heads": (
        merge_heads,
        {"heads": HEADS["q"], "weight": torch.randn(D, H * C), "bias": torch.zeros(D)},
    ),
    "aggregated_attention": (partial(aggregated_attention, size=(3, 5), window=3), MAP),
}  # fmt: skip
# What replaces a tensor x that fits.
WRONGS = {
    "a list": lambda x: x.tolist(),
    "text": lambda x: "x",
    "complex": lambda x: x.to(torch.complex64),
    "another kind": lambda x: x.int() if x.is_floating_point() else x.float(),
    "on another device": lambda x: x.to("meta"),
    "an axis more": lambda x: x.expand(3, 3, 3, *x.shape),
    "an axis less": lambda x: x[0],
    "a scalar": lambda x: x.flatten()[0],
}
for _axis in range(-4, 0):
    WRONGS[f"axis {_axis} empty"] = lambda x, axis=_axis: x.narrow(axis, 0, 0)
    WRONGS[f"axis {_axis} longer"] = lambda x, axis=_axis: torch.cat(
        [x, x.narrow(axis, 0, 1)], dim=axis
    )

# What of these fits: masks broadcast, more tokens are tokens, and who counts heads by a gate
# cannot tell that another number was meant.
_BROADCAST = {"an axis less", "a scalar"}
RIGHT = {
    ("head_attention with mask and bias", "mask"): _BROADCAST,
    ("head_attention with mask and bias", "bias"): _BROADCAST,
    ("head_attention, decode", "mask"): _BROADCAST,
    ("route_heads", "shared_logits"): {"axis -1 empty", "axis -1 longer"},
    ("route_heads", "routed_logits"): {"axis -1 longer"},
    ("route_heads, sparsemax", "shared_logits"): {"axis -1 empty", "axis -1 longer"},
    ("route_heads, sparsemax", "routed_logits"): {"axis -1 longer"},
    ("route_heads_by_query_norm", "q"): {
        "on another device", "axis -4 empty", "axis -4 longer", "axis -3 empty", "axis -3 longer",
        "axis -2 longer", "axis -1 empty", "axis -1 longer",
    },
    ("route_tokens", "logits"): {"an axis less", "an axis more", "axis -2 empty", "axis -2 longer"},
    ("project_heads", "gate"): {"axis -1 longer"},
    ("merge_heads", "heads"): {
        "axis -4 empty", "axis -4 longer", "axis -3 empty", "axis -3 longer",
    },
}  # fmt: skip


def refusal(function, given):
    """What the call is refused with; None where it returns something finite."""
    try:
        result = function(**given)
    except ValueError as error:
        return str(error)
    for got in result if isinstance(result, tuple) else (result,):
        assert got is None or got.is_meta or got.isfinite().all()
    return None


@pytest.mark.filterwarnings("ignore:std.* degrees of freedom")  # of no tokens
@pytest.mark.usefixtures("unchecked", "native_kernels")
@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, (_, tensors) in CALLS.items() for name in tensors]
)
def test_a_wrong_tensor_is_named(call, name):
    function, tensors = CALLS[call]
    taken = set()
    for what, change in WRONGS.items():
        if what.startswith("axis") and -int(what.split()[1]) > tensors[name].ndim:
            continue
        said = refusal(function, tensors | {name: change(tensors[name])})
        # Where two disagree, either may be the one that is named.
        assert said is None or any(
            known in said for known in (*tensors, "top_k", "shared_heads")
        ), said
        taken |= {what} if said is None else set()
    assert taken == RIGHT.get((call, name), set())


@pytest.mark.usefixtures("unchecked", "native_kernels")
@pytest.mark.parametrize("call", CALLS)
def test_right_ones_work(call):
    assert refusal(*CALLS[call]) is None


@pytest.mark.usefixtures("unchecked", "native_kernels")
# impl "triton" is for GPUs, where nothing waits for the indices.
@pytest.mark.parametrize("impl", [x for x in ExpertImpl.__args__ if x not in ("auto", "triton")])
@pytest.mark.parametrize("wrong", [E, -2, 2**31, -(2**40)])
def test_an_expert_that_there_is_not_is_refused_before_anything_is_written(impl, wrong):
    tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in EXPERTS.items()}
    tensors["x"] = torch.randn(N, 16).bfloat16()
    tensors["up_proj"] = torch.randn(E, 16, 16).bfloat16()
    tensors["down_proj"] = torch.randn(E, 16, 16).bfloat16()
    indices = tensors["indices"].clone()
    indices[5, 1] = wrong
    with pytest.raises(ValueError, match=f"indices holds {wrong}; it must hold experts, 0..10"):
        expert_mlp(**tensors | {"indices": indices}, impl=impl)


NUMBERS = [None, "x", -1, 0, 1, 2.5, 10**30, float("nan"), float("inf"), True, [], (), {}, object()]
# The values of these that each option takes.
OPTIONS = {
    ("head_attention", "causal"): [True],
    ("head_attention", "scale"): [None, -1, 0, 1, 2.5, 10**30],
    ("head_attention", "dropout"): [0],
    ("head_attention", "share_on"): [None, 0, 1],
    ("head_attention", "impl"): [],
    ("expert_mlp", "activation"): [],
    ("expert_mlp", "impl"): [],
    ("route_heads", "top_k"): [0, 1],
    ("route_heads", "mode"): [],
    ("route_heads", "scores"): [],
    ("route_heads_by_query_norm", "shared_heads"): [0, 1, [], ()],
    ("route_heads_by_query_norm", "top_k"): [0, 1],
    ("route_heads_by_query_norm", "scale_by_std"): [True],
    ("route_tokens", "top_k"): [1],
    ("route_tokens", "normalize"): [True],
    ("route_tokens", "scores"): [],
    ("aggregated_attention", "size"): [],
    ("aggregated_attention", "window"): [],
    ("aggregated_attention", "impl"): [],
}


@pytest.mark.usefixtures("unchecked", "native_kernels")
@pytest.mark.parametrize(("call", "option"), OPTIONS)
def test_a_wrong_option_is_named(call, option):
    function, tensors = CALLS[call]
    taken = []
    for value in NUMBERS:
        said = refusal(function, tensors | {option: value})
        assert said is None or option in said or "w²" in said, said
        taken += [value] if said is None else []
    assert taken == OPTIONS[call, option]


@pytest.mark.usefixtures("unchecked", "native_kernels")
@pytest.mark.parametrize("impl", [x for x in HeadImpl.__args__ if x not in ("auto", "triton")])
def test_no_heads_of_keys_are_refused(impl):
    none = torch.zeros(B, S, 0, C)
    with pytest.raises(ValueError, match="its Hkv = 0 heads must divide q's H = 6"):
        head_attention(**HEADS | {"k": none, "v": none}, impl=impl)
