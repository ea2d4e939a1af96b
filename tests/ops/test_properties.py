"""Every implementation of every op against float64, on calls that hypothesis thinks up.

`--hypothesis-profile=campaign` tries many more, `--hypothesis-seed=N` others.
"""

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    LAYOUTS,
    PATTERNS,
    SEEDS,
    assert_as_near,
    gates,
    laid_out,
    leaves,
    scored,
    value_and_gradients,
)
from hypothesis import assume, given
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from headwise.ops import aggregated_attention, expert_mlp, head_attention, route_heads
from headwise.ops.attention import Operands, choose
from headwise.ops.head_projection import merge_heads, project_heads
from headwise.ops.logits import router_logits

LENGTHS = st.sampled_from([1, 2, 3, 5, 31, 64, 65, 129, 257])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(data=st.data(), seed=SEEDS)
def test_head_attention(kernels_built, data, seed):
    torch.manual_seed(seed)
    B, G, R = (data.draw(st.integers(1, 3)) for _ in range(3))
    T, S = data.draw(LENGTHS), data.draw(LENGTHS)
    dtype, C = data.draw(DTYPES), data.draw(st.sampled_from([2, 8, 14, 32, 64, 80]))
    largest = data.draw(st.sampled_from([1.0, 1.0, 60.0, 1000.0]))
    shapes = {"q": (B, T, G * R, C), "k": (B, S, G, C), "v": (B, S, G, C)}
    tensors = {
        name: laid_out(torch.randn(shape).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
        for name, shape in shapes.items()
    }
    tensors["q"] = tensors["q"] * largest
    tensors["gate"] = gates((B, T, G * R), data.draw(PATTERNS))
    options = {
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([None, None, 0.7, -0.7, 0.0])),
    }
    sizes = {"B": B, "H": G * R, "T": T, "S": S}
    if data.draw(st.integers(0, 2)) == 0:
        options["mask"] = data.draw(scored(sizes, lambda shape: torch.rand(shape) > 0.4))
    if data.draw(st.integers(0, 3)) == 0:
        tensors["bias"] = data.draw(scored(sizes, lambda shape: torch.randn(shape).to(dtype)))
    learns = data.draw(st.booleans())
    names = ["auto", "gathered", "dense"]
    if kernels_built and "bias" not in tensors and ("mask" not in options or not learns):
        names += ["native"]
    names += [] if learns else ["decode"]
    impl = data.draw(st.sampled_from(names))
    few = choose(Operands(*(tensors[name].detach() for name in ("q", "k", "v", "gate")))).decoding
    assume(not (impl == "native" and "mask" in options and not few))

    def run(impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        own = leaves(tensors, dtype)
        if learns:
            return value_and_gradients(head_attention(**own, **options, impl=impl), own)
        with torch.no_grad():
            return {"y": head_attention(**own, **options, impl=impl)}

    got = run(impl)
    assert_as_near(got, run("dense"), run("dense", torch.float64), largest=4 * largest)
    off = tensors["gate"] == 0
    assert not got["y"][off].any()
    if learns:
        assert not got["q"][off].any()
        assert not got["gate"][off].any()


@given(data=st.data(), seed=SEEDS)
def test_expert_mlp(kernels_built, data, seed):
    torch.manual_seed(seed)
    N, K, E = (data.draw(st.integers(low, 7)) for low in (0, 0, 1))
    N = N * data.draw(st.sampled_from([1, 1, 83]))
    D, F = (2 * data.draw(st.sampled_from([1, 7, 16, 33, 64])) for _ in range(2))
    dtype, gated = data.draw(DTYPES), data.draw(st.integers(1, 2))
    layout = st.sampled_from(("contiguous", "channels apart"))
    tensors = {
        "x": laid_out(torch.randn(N, D).to(dtype), data.draw(layout)),
        "weights": torch.randn(N, K),
        "up_proj": laid_out((torch.randn(E, F * gated, D) / D**0.5).to(dtype), data.draw(layout)),
        "down_proj": laid_out((torch.randn(E, D, F) / F**0.5).to(dtype), data.draw(layout)),
    }
    of_indices = data.draw(st.sampled_from([torch.int32, torch.int64]))
    indices = torch.randint(-1, E, (N, K), dtype=of_indices)
    indices[torch.rand(N, K) < data.draw(st.sampled_from([0, 0, 0.5, 1]))] = E - 1
    tensors["weights"][torch.rand(N, K) < data.draw(st.sampled_from([0, 0.3]))] = 0
    activation = data.draw(st.sampled_from(["silu", "relu", "gelu"]))
    names = ["auto", "grouped", "dense"] + ["native"] * (kernels_built and activation != "gelu")
    impl = data.draw(st.sampled_from(names))

    def run(impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        own = leaves(tensors, dtype)
        y = expert_mlp(**own, indices=indices, activation=activation, impl=impl)
        return value_and_gradients(y, own)

    assert_as_near(run(impl), run("reference"), run("reference", torch.float64), largest=16)


@given(data=st.data(), seed=SEEDS)
def test_route_heads(kernels_built, data, seed):
    torch.manual_seed(seed)
    batch = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=2)))
    shared, routed = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 9))
    top_k = data.draw(st.integers(0, routed))
    options = {
        "top_k": top_k,
        "mode": data.draw(st.sampled_from(["released", "paper"])),
        "scores": data.draw(st.sampled_from(["softmax", "softmax", "sigmoid", "sparsemax"])),
    }
    # Where sigmoids are 1 in float32, all are equal.
    sizes = [1.0] if options["scores"] == "sigmoid" else [1.0, 1.0, 300.0]
    size = data.draw(st.sampled_from(sizes))
    together = size * torch.randn(*batch, shared + routed + 2)
    if options["scores"] != "sparsemax":
        together = together.round(decimals=1)  # so that some are equal
    names = ("shared_logits", "routed_logits", "stage_logits")

    def run(x: Tensor) -> dict[str, Tensor]:
        own = x.detach().requires_grad_()
        parts = dict(zip(names, own.split([shared, routed, 2], dim=-1), strict=True))
        routing = route_heads(**parts, **options)
        y = torch.cat([routing.weights, routing.probabilities], dim=-1)
        return value_and_gradients(y, {"logits": own}) | {"indices": routing.indices}

    got, want = run(together), run(together.double())
    assert (got["indices"] < max(routed, 1)).all()
    if size > 1:  # scores that float64 tells apart are 0 in float32
        got.pop("indices"), want.pop("indices")
    assert_close(got, want, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.usefixtures("native_kernels")
@given(data=st.data(), seed=SEEDS)
def test_projections_of_heads(data, seed):
    torch.manual_seed(seed)
    B, T = data.draw(st.integers(1, 3)), data.draw(LENGTHS)
    H, C, D = data.draw(st.integers(1, 5)), *(2 * data.draw(st.integers(1, 17)) for _ in range(2))
    dtype, bias = data.draw(DTYPES), data.draw(st.sampled_from([None, "contiguous", "expanded"]))
    gate = gates((B, T, H), data.draw(PATTERNS))
    on = (gate != 0).unsqueeze(-1)
    layout = st.sampled_from(LAYOUTS[:3])
    x = laid_out(torch.randn(B, T, D).to(dtype), data.draw(layout))
    heads = (torch.randn(B, T, H, C) * on).to(dtype)
    w_in, w_out = (
        laid_out(torch.randn(n, m).div(m**0.5).to(dtype), data.draw(st.sampled_from(LAYOUTS[:2])))
        for n, m in ((H * C, D), (D, H * C))
    )
    b_in, b_out = (
        None if bias is None else torch.randn(n if bias == "contiguous" else 1).to(dtype).expand(n)
        for n in (H * C, D)
    )
    q, y = project_heads(x, w_in, b_in, gate), merge_heads(heads, w_out, b_out)

    def wide(*tensors):
        return [None if x is None else x.double() for x in tensors]

    tolerance = dict.fromkeys(("rtol", "atol"), 2e-5 if dtype == torch.float32 else 2e-2)
    assert_close(q.double(), linear(*wide(x, w_in, b_in)).view(heads.shape) * on, **tolerance)
    assert_close(y.double(), linear(*wide(heads.flatten(2), w_out, b_out)), **tolerance)
    assert_close(router_logits(x, w_in).double(), linear(*wide(x, w_in)), rtol=1e-5, atol=2e-5)


@given(data=st.data(), seed=SEEDS)
def test_aggregated_attention(kernels_built, data, seed):
    torch.manual_seed(seed)
    B, H, height, width, P = (data.draw(st.integers(low, 5)) for low in (1, 1, 1, 1, 0))
    C = data.draw(st.sampled_from([2, 14, 24]))
    T, window, dtype = height * width, data.draw(st.sampled_from([1, 3, 5])), data.draw(DTYPES)
    shapes = {
        "q": (B, T, H, C), "k": (B, T, H, C), "v": (B, T, H, C), "unit_q": (B, T, H, C),
        "k_pool": (B, P, H, C), "v_pool": (B, P, H, C),
    }  # fmt: skip
    tensors = {
        name: laid_out(torch.randn(shape).to(dtype), data.draw(st.sampled_from(LAYOUTS[:3])))
        for name, shape in shapes.items()
    }
    tensors |= {
        "gate": gates((B, T, H), data.draw(PATTERNS)),
        "local_bias": torch.randn(H, window**2), "pool_bias": torch.randn(H, T, P),
        "learned_tokens": torch.randn(H, C, window**2).to(dtype),
        "learned_bias": torch.randn(H, window**2),
    }  # fmt: skip

    def run(impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        own = leaves(tensors, dtype)
        y = aggregated_attention(**own, size=(height, width), window=window, impl=impl)
        return value_and_gradients(y, own)

    impl = data.draw(st.sampled_from(["auto", "dense"] + ["native"] * kernels_built))
    assert_as_near(run(impl), run("dense"), run("dense", torch.float64), largest=16)
