"""MHMoE and MoE: reduce to each other and to an FFN, leave padding out, tokens independent."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from headwise import MHMoE, MoE, balance_loss, router_z_loss

B, T, D = 2, 7, 15
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}
MASK = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])


def ffn(x, up, down, gated=True):
    hidden = functional.linear(x, up)
    if gated:
        gate, value = hidden.chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * value, down)
    return functional.linear(functional.silu(hidden), down)


@pytest.mark.parametrize(
    "options", [{}, {"shared_expert_dim": 5}, {"glu": False}, {"router": "cosine"}]
)
def test_one_head_without_head_and_merge_layer_is_moe(options):
    moe = MoE(D, **EXPERTS, **options)
    mh_moe = MHMoE(D, num_heads=1, head_layer=False, merge_layer=False, **EXPERTS, **options)
    mh_moe.load_state_dict(moe.state_dict())
    x = torch.randn(B, T, D)
    (y, routing), (want, want_routing) = mh_moe(x, MASK), moe(x, MASK)
    assert torch.equal(y, want)
    assert all(map(torch.equal, routing, want_routing))


@pytest.mark.parametrize("gated", [True, False])
def test_one_expert_is_a_plain_ffn(gated):
    layer = MoE(D, num_experts=1, top_k=1, expert_dim=11, glu=gated)
    x = torch.randn(B, T, D)
    y, routing = layer(x)
    up, down = layer.experts.first_proj[0], layer.experts.down_proj[0]
    assert_close(y, ffn(x, up, down, gated), rtol=1e-6, atol=1e-7)
    assert (routing.weights == 1).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner_residual", [False, True])
@pytest.mark.parametrize("shared", [None, 13])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_paper_s_equations(bias, inner_residual, shared, normalize):
    layer = MHMoE(
        D, num_heads=3, **EXPERTS, bias=bias, inner_residual=inner_residual,
        shared_expert_dim=shared, normalize_top_k=normalize,
    ).double()  # fmt: skip
    if bias:
        torch.nn.init.normal_(layer.head_proj.bias)
    x = torch.randn(B, T, D, dtype=torch.float64)
    y, routing = layer(x)
    for b in range(B):
        for t in range(T):
            subs = []
            for j, u in enumerate(layer.head_proj(x[b, t]).chunk(3)):
                p = (layer.router.weight @ u).softmax(0)
                best = p.topk(2)
                weights = best.values / best.values.sum() if normalize else best.values
                ups, downs = layer.experts.first_proj, layer.experts.down_proj
                o = sum(
                    w * ffn(u, ups[e], downs[e]) for w, e in zip(weights, best.indices, strict=True)
                )
                subs.append(u + o if inner_residual else o)
                assert routing.indices[b, t, j].tolist() == best.indices.tolist()
            want = layer.merge_proj(torch.cat(subs))
            if shared:
                want = want + ffn(
                    x[b, t], layer.shared_expert.first_proj[0], layer.shared_expert.down_proj[0]
                )
            assert_close(y[b, t], want)


# The first version of MH-MoE, and every option alone.
FIRST_VERSION = {
    "bias": True, "inner_residual": True, "normalize_top_k": False, "glu": False,
    "activation": "gelu", "router": "cosine",
}  # fmt: skip
VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        {}, FIRST_VERSION, {"shared_expert_dim": 13}, {"scores": "sigmoid"}, {"bias_rate": 0.1},
        *({name: value} for name, value in FIRST_VERSION.items()),
    ],
    ids=str,
)  # fmt: skip


def drawn(layer):
    """With biases that are not 0, in float64."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    return layer.double()


@VARIANTS
@pytest.mark.parametrize("masked", [False, True])
def test_implementations_agree_in_values_and_gradients(variant, masked):
    options = {"num_heads": 3, **EXPERTS, **variant}
    layers = [drawn(MHMoE(D, **options, impl=impl)) for impl in ("reference", "grouped")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, results = torch.randn(B, T, D, dtype=torch.float64), []
    for layer in layers:
        y, routing = layer(x, MASK if masked else None)
        loss = y.square().sum() + balance_loss(routing) + router_z_loss(routing)
        results.append([y, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert_close(*results, rtol=1e-10, atol=1e-10)


def test_padding_goes_nowhere_and_is_not_counted():
    layer = MHMoE(D, num_heads=3, **EXPERTS)
    x = torch.randn(B, T, D)
    y, routing = layer(x, MASK)
    assert routing.indices.shape == (B, T, 3, 2)
    assert (routing.indices[~MASK] == -1).all()
    assert (y[~MASK] == 0).all()
    _, real = layer(x[MASK].unsqueeze(0))
    assert_close(balance_loss(routing), balance_loss(real))
    assert_close(router_z_loss(routing), router_z_loss(real))


@VARIANTS
@pytest.mark.parametrize("training", [False, True])
def test_a_token_depends_on_itself_only(variant, training):
    layer = drawn(MHMoE(D, num_heads=3, **EXPERTS, **variant)).train(training)
    x = torch.randn(B, T, D, dtype=torch.float64)
    y = layer(x)[0]
    assert_close(y[:1], layer(x[:1])[0])
    assert_close(y[:, :4], layer(x[:, :4])[0])
    changed = x.masked_fill(~MASK.unsqueeze(-1), 100)
    assert_close(y[MASK], layer(changed, MASK)[0][MASK])


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_bfloat16_routes_in_float32(router):
    layer, x = MHMoE(D, num_heads=3, router=router, **EXPERTS), torch.randn(B, T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, autocast = layer(x)
    assert y.dtype == torch.bfloat16
    y, half = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    for routing in (autocast, half):
        assert routing.weights.dtype == routing.probabilities.dtype == torch.float32


def test_autocast_trains_close_to_float32():
    layer, x = MoE(D, **EXPERTS), torch.randn(B, T, D)
    y, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_y, autocast = layer(x)
    assert torch.equal(plain.indices, autocast.indices)
    assert_close(autocast_y.float(), y, rtol=0, atol=0.03 * y.abs().max().item())
    autocast_y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize("gated", [True, False])
def test_parameters_have_the_documented_shapes(gated):
    layer = MHMoE(D, num_heads=3, **EXPERTS, glu=gated, shared_expert_dim=13, bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    rows, first = (2, "gate_up_proj") if gated else (1, "up_proj")
    assert shapes == {
        "head_proj.weight": (15, 15), "head_proj.bias": (15,),
        "merge_proj.weight": (15, 15), "merge_proj.bias": (15,),
        "router.weight": (7, 5),
        f"experts.{first}": (7, 11 * rows, 5), "experts.down_proj": (7, 5, 11),
        f"shared_expert.{first}": (1, 13 * rows, 15), "shared_expert.down_proj": (1, 15, 13),
    }  # fmt: skip


def test_head_and_merge_layer_start_as_in_the_released_code():
    layer = MHMoE(D, num_heads=3, **EXPERTS, bias=True)
    # Xavier: uniform within gain · √(6 / (fan in + fan out)).
    bound = (6 / (2 * D)) ** 0.5
    assert 0.6 * bound < layer.head_proj.weight.abs().max() <= 0.5**0.5 * bound
    assert 0.9 * bound < layer.merge_proj.weight.abs().max() <= bound
    assert (layer.head_proj.bias == 0).all()
    assert (layer.merge_proj.bias == 0).all()


def test_reset_experts_sets_the_deviation_of_all_of_them():
    layer = MHMoE(40, num_heads=4, num_experts=7, top_k=2, expert_dim=31, shared_expert_dim=13)
    layer.reset_experts(std=0.5)
    others = [layer.experts.down_proj, *layer.shared_expert.parameters()]
    for weight, std in [(layer.experts.first_proj, 1.0), *((w, 0.5) for w in others)]:
        assert weight.std().item() == pytest.approx(std, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "num_heads is 4.*dim = 15"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_k": 8}, r"top_k is 8.*1\.\.7"),
        ({"expert_dim": 0}, "expert_dim is 0"),
        ({"router": "hash"}, "router is 'hash'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_field_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        MHMoE(D, **{"num_heads": 3, **EXPERTS} | changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes", [{"shared_expert_dim": -1}, {"activation": "tanh"}, {"impl": "fast"}]
)
def test_wrong_values_are_refused_by_the_constructor(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is"):
        MHMoE(D, num_heads=3, **EXPERTS, **changes)
