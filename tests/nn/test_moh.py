"""MoHAttention: equal to plain attention with all heads on, budgets kept, tokens independent."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from headwise import MoHAttention, balance_loss

B, T, D, C = 2, 7, 15, 3
HEADS = {"num_heads": 5, "shared_heads": 2, "active_heads": 3}


def padding(left: bool) -> torch.Tensor:
    """Row 0 has three tokens of padding, row 1 none."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = False
    return mask if left else mask.flip(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [5, 1])
@pytest.mark.parametrize("shared", [0, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_all_heads_on_is_plain_attention_bit_for_bit(causal, kv_heads, shared, masked):
    layer = MoHAttention(
        D, num_heads=5, shared_heads=shared, active_heads=5,
        num_kv_heads=kv_heads, router="query_norm", causal=causal,
    )  # fmt: skip
    x = torch.randn(B, T, D)
    mask = padding(left=False) if masked else None
    y, routing = layer(x, mask)
    q, k, v = (
        p(x).unflatten(-1, (-1, C)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    seen = None
    if masked:
        seen = mask[:, None, None] & (torch.ones(T, T, dtype=bool).tril() if causal else True)
    heads = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal and not masked, enable_gqa=kv_heads != 5
    )
    plain = layer.o_proj(heads.transpose(1, 2).flatten(2))
    real = torch.ones(B, T, dtype=bool) if mask is None else mask
    assert torch.equal(y[real], plain[real])
    assert (routing.weights[real] == 1).all()


ROUTERS = pytest.mark.parametrize(
    "router",
    [
        {"router": "two_stage"}, {"router": "one_stage"}, {"router": "query_norm"},
        {"router": "two_stage", "scores": "sparsemax"},
        {"router": "two_stage", "scores": "sigmoid", "mode": "paper"},
        {"router": "one_stage", "scores": "sparsemax", "mode": "paper"},
    ],
    ids=lambda router: "-".join(router.values()),
)  # fmt: skip


def drawn_apart(layer):
    """With scores far enough from each other for sparsemax to leave heads out."""
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def kept(layer, on):
    """Whether that many heads are on: as many as the budget says, with sparsemax at most."""
    budget = layer.budget
    if getattr(layer.router, "scores", None) == "sparsemax" and budget.top_k > 0:
        return (budget.shared_heads < on) & (on <= budget.active_heads)
    return on == budget.active_heads


@ROUTERS
@pytest.mark.parametrize(
    ("num_heads", "shared", "active"),
    [(5, 2, 3), (5, 0, 2), (5, 1, 4), (5, 5, 5), (5, 4, 5), (1, 0, 1), (1, 1, 1), (5, 0.4, 0.6)],
)
def test_every_budget_runs_trains_and_is_kept(num_heads, shared, active, router):
    layer = MoHAttention(
        D, num_heads=num_heads, shared_heads=shared, active_heads=active, head_dim=C, **router
    )
    y, routing = layer(torch.randn(B, T, D))
    assert kept(layer, (routing.weights != 0).sum(-1)).all()
    (y.square().sum() + balance_loss(routing)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [5, 1])
@ROUTERS
def test_implementations_agree_in_values_and_gradients(router, kv_heads, causal):
    options = {"num_kv_heads": kv_heads, "causal": causal, **router}
    layers = [
        MoHAttention(D, **HEADS, **options, impl=impl).double() for impl in ("reference", "dense")
    ]
    drawn_apart(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(B, T, D, dtype=torch.float64)
    mask = padding(left=True)
    results = []
    for layer in layers:
        y, routing = layer(x, mask)
        loss = y.square().sum() + balance_loss(routing)
        results.append([y, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert_close(*results, rtol=1e-10, atol=1e-10)


def test_a_head_whose_score_is_0_is_off():
    layer = MoHAttention(D, num_heads=5, shared_heads=2, active_heads=5, scores="sparsemax")
    x = torch.randn(1, 1, D)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.routed.weight.zero_()
        layer.router.routed.weight[:, 0] = torch.tensor([2.0, -9.0, 1.5])
        y, routing = layer(x)
        assert_close(routing.probabilities, torch.tensor([[[0.75, 0, 0.25]]]))
        assert (routing.weights == 0).tolist() == [[[False, False, False, True, False]]]
        # The token attends to itself: what a head says is its value, and nobody hears the fourth.
        layer.v_proj.bias[3 * C : 4 * C] += 100
        assert torch.equal(layer(x)[0], y)


@ROUTERS
class TestIndependence:
    def layer(self, router, **options):
        return drawn_apart(MoHAttention(D, **HEADS, **router, **options)).double()

    def test_of_batch_mates(self, router):
        layer, x = self.layer(router), torch.randn(B, T, D, dtype=torch.float64)
        assert_close(layer(x)[0][:1], layer(x[:1])[0])

    def test_of_later_tokens(self, router):
        layer, x = self.layer(router, causal=True), torch.randn(B, T, D, dtype=torch.float64)
        changed = x.clone()
        changed[:, 4:] = 100 * torch.randn(B, 3, D)
        assert torch.equal(layer(x)[0][:, :4], layer(changed)[0][:, :4])
        assert_close(layer(x)[0][:, :4], layer(x[:, :4])[0])

    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_of_padding(self, router, left, causal):
        layer, mask = self.layer(router, causal=causal), padding(left)
        x = torch.randn(B, T, D, dtype=torch.float64)
        changed = x.masked_fill(~mask.unsqueeze(-1), 100)
        y, routing = layer(x, mask)
        assert torch.equal(y[mask], layer(changed, mask)[0][mask])
        assert_close(y[0][mask[0]], layer(x[:1, mask[0]])[0][0])
        assert y.isfinite().all()
        assert (routing.weights[~mask] == 0).all()
        assert (routing.indices[~mask] == -1).all()
        assert_close(y[~mask], layer.o_proj.bias.expand(3, D))


def test_equal_query_norms_train_without_nan():
    layer = MoHAttention(D, **HEADS, router="query_norm")
    torch.nn.init.zeros_(layer.q_proj.weight)
    torch.nn.init.zeros_(layer.q_proj.bias)
    y, routing = layer(torch.randn(B, T, D))
    assert (routing.indices == 0).all()
    (y.sum() + balance_loss(routing)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@ROUTERS
def test_bfloat16_routes_in_float32(router):
    layer, x = MoHAttention(D, **HEADS, **router), torch.randn(B, T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, autocast = layer(x)
    assert y.dtype == torch.bfloat16
    y, half = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    for routing in (autocast, half):
        assert routing.weights.dtype == routing.probabilities.dtype == torch.float32


def test_autocast_does_not_change_what_the_learned_router_decides():
    layer, x = MoHAttention(D, **HEADS), torch.randn(B, T, D)
    _, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, autocast = layer(x)
    assert torch.equal(plain.weights, autocast.weights)


def test_maps_exist_only_where_there_is_a_choice():
    def names(shared, active):
        layer = MoHAttention(D, num_heads=5, shared_heads=shared, active_heads=active)
        return {name.split(".")[0] for name, _ in layer.router.named_parameters()}

    assert names(2, 3) == {"shared", "routed", "stage"}
    assert names(1, 3) == {"routed", "stage"}
    assert names(0, 3) == {"routed"}
    assert names(5, 5) == {"shared"}


GROUPS = {"num_heads": 15, "num_kv_heads": 5, "head_dim": C, "route_groups": True}


@pytest.mark.parametrize("router", ["two_stage", "one_stage", "query_norm"])
@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize(("shared", "active"), [(6, 9), (0, 6), (3, 12), (15, 15), (0.4, 0.6)])
def test_whole_groups_are_on_or_off(shared, active, mode, router):
    layer = MoHAttention(
        D, **GROUPS, shared_heads=shared, active_heads=active, router=router, mode=mode
    )
    mask = padding(left=True)
    y, routing = layer(torch.randn(B, T, D), mask)
    budget = layer.budget
    on = (routing.weights != 0).sum(-1)
    assert (on[mask] == budget.active_heads).all()
    assert (on[~mask] == 0).all()
    groups = routing.weights.unflatten(-1, (5, 3))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    assert routing.probabilities.shape == routing.logits.shape == (B, T, budget.routed_groups)
    assert routing.indices.shape == (B, T, budget.kept_groups)
    (y.square().sum() + balance_loss(routing)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("router", ["two_stage", "one_stage", "query_norm"])
@pytest.mark.parametrize("budget", [(2, 3), (0, 2), (0.4, 0.75)])
def test_groups_of_one_head_are_heads_bit_for_bit(budget, router):
    shared, active = budget
    results, x = [], torch.randn(B, T, D)
    for route_groups in (False, True):
        torch.manual_seed(1)
        layer = MoHAttention(
            D, num_heads=5, shared_heads=shared, active_heads=active, router=router,
            causal=True, route_groups=route_groups,
        )  # fmt: skip
        y, routing = layer(x)
        loss = y.square().sum() + balance_loss(routing)
        results.append([y, *routing[:4], *torch.autograd.grad(loss, list(layer.parameters()))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_no_key_or_value_of_a_group_that_is_off_is_read(router):
    layer = MoHAttention(
        D, **GROUPS, shared_heads=3, active_heads=6, router=router, impl="decode"
    ).eval()
    x, seen = torch.randn(1, 1, D), []
    layer.v_proj.register_forward_hook(lambda _, __, v: v.masked_fill(seen[-1], float("nan")))
    with torch.no_grad():
        seen.append(torch.zeros(5 * C, dtype=torch.bool))
        y, routing = layer(x)
        seen.append((routing.weights[0, 0, ::3] == 0).repeat_interleave(C))
        assert torch.equal(layer(x)[0], y)


def test_repr_says_what_was_rounded():
    layer = MoHAttention(D, num_heads=5, shared_heads=0.5, active_heads=4)
    assert "3 shared + 1 of 2 routed = 4 active" in repr(layer)
    assert "shared_heads 0.5 of 5 = 2.5 rounded to 3" in repr(layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active_heads": 6}, r"active_heads is 6.*1\.\.5"),
        ({"shared_heads": 4}, "shared_heads is 4, more than active_heads = 3"),
        ({"num_heads": 4}, "dim is 15.*num_heads = 4"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2.*num_heads = 5"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"router": "soft"}, "router is 'soft'"),
        ({"mode": "soft"}, "mode is 'soft'"),
        ({"scores": "relu"}, "scores is 'relu'"),
        ({"router": "query_norm", "scores": "sigmoid"}, "scores is 'sigmoid'.*'softmax'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_field_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        MoHAttention(D, **HEADS | changes)


@pytest.mark.parametrize(
    ("shared", "active", "message"),
    [
        (2, 9, "shared_heads is 2; whole groups of 3 heads.* multiple of 3, such as 3"),
        (3, 10, "active_heads is 10; whole groups of 3 heads.* multiple of 3, such as 12"),
        (0, 0.05, r"active_heads is 0\.05; at least 3 of 15"),
    ],
)
def test_a_budget_that_splits_groups_is_refused(shared, active, message):
    with pytest.raises(ValueError, match=message):
        MoHAttention(D, **GROUPS, shared_heads=shared, active_heads=active)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"impl": "flash"}, {"router": "query_norm", "mode": "soft"}])
def test_a_wrong_name_is_refused_by_the_constructor(options):
    with pytest.raises(ValueError, match=r"flash|soft"):
        MoHAttention(D, **HEADS, **options)
