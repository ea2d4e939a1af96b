"""ternarize and pack on layers: what changes, what stays, how much it saves, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from headwise import MHMoE, MoE, MoHAttention, balance_loss
from headwise.bitnet import pack, ternarize
from headwise.nn.bitlinear import BitLinear, PackedLinear, TernaryExperts
from headwise.ops.activations import activate
from headwise.ops.ternary import quantize_weight, ternary_linear
from headwise.parity import count_flops, count_parameters

B, T, D = 2, 7, 15
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}
HEADS = {"num_heads": 5, "shared_heads": 2, "active_heads": 3}
LAYERS = {
    "mh_moe": lambda: MHMoE(D, num_heads=3, shared_expert_dim=13, bias=True, **EXPERTS),
    "moe": lambda: MoE(D, glu=False, router="cosine", **EXPERTS),
    "two_stage": lambda: MoHAttention(D, **HEADS, causal=True),
    "query_norm": lambda: MoHAttention(D, **HEADS, router="query_norm", bias=False),
    "mlp": lambda: Plain(nn.Sequential(nn.Linear(D, 11), nn.SiLU(), nn.Linear(11, D))),
}
MASK = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])


class Plain(nn.Module):
    """A layer without routing, called as ours."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x), None


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def test_parameters_stay_the_same_objects_and_only_outputs_change(layer):
    x, before = torch.randn(B, T, D), dict(layer.named_parameters())
    y = layer(x)[0]
    assert ternarize(layer) is layer
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not torch.allclose(layer(x)[0], y)


def test_mh_moe_is_made_of_ternary_maps():
    layer = ternarize(LAYERS["mh_moe"]().double())
    x = torch.randn(B, T, D, dtype=torch.float64)
    y, routing = layer(x)

    def bit(x, weight, bias=None):
        return ternary_linear(x, quantize_weight(weight), bias)

    def expert(x, up, down):
        raised = torch.cat([bit(x, w) for w in up.chunk(2)], dim=-1)
        return bit(activate(raised, "silu", down.shape[1]), down)

    u = bit(x, layer.head_proj.weight, layer.head_proj.bias).unflatten(-1, (3, 5))
    # The router reads sub-tokens as they are, in full precision.
    assert_close(routing.logits, linear(u, layer.router.weight))
    out = torch.zeros_like(u)
    for place in torch.cartesian_prod(*map(torch.arange, u.shape[:3])).tolist():
        b, t, h = place
        for weight, e in zip(routing.weights[b, t, h], routing.indices[b, t, h], strict=True):
            up, down = layer.experts.first_proj[e], layer.experts.down_proj[e]
            out[b, t, h] += weight * expert(u[b, t, h], up, down)
    want = bit(out.flatten(2), layer.merge_proj.weight, layer.merge_proj.bias)
    want += expert(x, layer.shared_expert.first_proj[0], layer.shared_expert.down_proj[0])
    assert_close(y, want)


def test_every_weight_learns(layer):
    ternarize(layer)
    x = torch.randn(B, T, D, requires_grad=True)
    y, routing = layer(x)
    loss = y.square().sum()
    loss = loss if routing is None else loss + balance_loss(routing)
    loss.backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        # A bias of the keys shifts all scores of a query alike.
        if name != "k_proj.bias":
            assert (tensor.grad != 0).any(), name


def test_training_lowers_the_loss(layer):
    ternarize(layer)
    x, wanted = torch.randn(B, T, D), torch.randn(B, T, D)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (layer(x)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_token_depends_on_itself_only_and_padding_on_nothing(layer):
    ternarize(layer).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    y = layer(x)[0]
    assert_close(layer(x[:1])[0], y[:1])
    masked = layer(x, MASK)[0]
    changed = x.masked_fill(~MASK.unsqueeze(-1), 100)
    assert_close(layer(changed, MASK)[0][MASK], masked[MASK])
    assert_close(layer(x[:1, :4])[0], masked[:1, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_packed_equals_trained_bit_for_bit(layer, dtype):
    mixed = dtype == "autocast"
    layer = ternarize(layer if mixed else layer.to(dtype)).eval()
    x = torch.randn(B, T, D, dtype=torch.float32 if mixed else dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        want = layer(x, MASK)[0]
        packed = pack(copy.deepcopy(layer))
        assert torch.equal(packed(x, MASK)[0], want)
    assert want.dtype == (torch.bfloat16 if mixed else dtype)


def test_packed_costs_the_same_flops_and_has_as_many_parameters(layer):
    flops, parameters = count_flops(layer, sequence_length=T), count_parameters(layer)
    assert flops
    for change in (ternarize, pack):
        change(layer)
        assert count_flops(layer, sequence_length=T) == flops
        assert count_parameters(layer) == parameters


def test_packed_is_an_eighth_of_bfloat16_and_a_scale_a_matrix():
    layer = MHMoE(48, num_heads=3, num_experts=7, top_k=2, expert_dim=20, shared_expert_dim=12)
    layer = layer.bfloat16()
    before = {name: tensor.nbytes for name, tensor in layer.state_dict().items()}
    after = {name: t.nbytes for name, t in pack(ternarize(layer)).state_dict().items()}
    scales = {name: size for name, size in after.items() if name.endswith("scale")}
    assert scales == {
        "head_proj.scale": 4, "merge_proj.scale": 4,
        "experts.up_scale": 4 * 7 * 2, "experts.down_scale": 4 * 7,
        "shared_expert.up_scale": 4 * 2, "shared_expert.down_scale": 4,
    }  # fmt: skip
    assert after.keys() - scales.keys() == before.keys()
    for name, size in before.items():
        assert after[name] == (size if name == "router.weight" else size / 8), name


def test_packed_weights_do_not_learn():
    layer = pack(ternarize(LAYERS["mh_moe"]()))
    assert not layer.training
    assert {name for name, _ in layer.named_parameters()} == {
        "head_proj.bias", "merge_proj.bias", "router.weight"
    }  # fmt: skip
    with pytest.raises(ValueError, match="PackedLinear is in training mode; packed weights cannot"):
        layer.train()(torch.randn(B, T, D))
    layer.head_proj.eval()
    with pytest.raises(ValueError, match="PackedExperts is in training mode"):
        layer(torch.randn(B, T, D))


def test_a_single_linear_map_becomes_another_module():
    linear = ternarize(nn.Linear(7, 5))
    assert type(linear) is BitLinear
    packed, x = pack(linear), torch.randn(3, 7)
    assert type(packed) is PackedLinear
    assert torch.equal(packed(x), linear(x))


def test_a_shared_layer_stays_shared():
    linear = nn.Linear(5, 5)
    packed = pack(ternarize(nn.Sequential(linear, nn.ReLU(), linear)))
    assert packed[0] is packed[2]
    assert type(packed[0]) is PackedLinear


class Quantised(nn.Linear):
    """Of a library that does other things with its weight."""


@pytest.mark.parametrize("kind", [lambda: Conv1D(5, 7), lambda: Quantised(7, 5)])
def test_unknown_matrices_are_refused_by_name_and_nothing_changes(kind):
    model = nn.Sequential(nn.Linear(7, 7), kind())
    name = type(model[1]).__name__
    with pytest.raises(ValueError, match=f"1 is a {name} with weight, which cannot be made"):
        ternarize(model)
    assert type(model[0]) is nn.Linear


def test_what_cannot_be_ternary_or_packed_is_refused():
    with pytest.raises(ValueError, match=r"LayerNorm has no nn\.Linear and no experts"):
        ternarize(nn.LayerNorm(5))
    with pytest.raises(ValueError, match=r"BitLinear has no nn\.Linear .* not ternary already"):
        ternarize(ternarize(nn.Linear(5, 5)))
    with pytest.raises(ValueError, match="MHMoE has no ternary layer to pack"):
        pack(LAYERS["mh_moe"]())
    with pytest.raises(ValueError, match="MHMoE has no ternary layer to pack"):
        pack(pack(ternarize(LAYERS["mh_moe"]())))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=6))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is a transformers model.*ternary=True"):
        ternarize(gpt2)


def test_a_forward_of_its_own_is_refused():
    # As accelerate's hooks do, which would go on calling the old one.
    model = nn.Sequential(nn.Linear(5, 5))
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="0 has a forward of its own, as device_map gives it"):
        ternarize(model)
    model = ternarize(nn.Sequential(nn.Linear(5, 5)))
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="0 has a forward of its own"):
        pack(model)


def test_ternary_experts_have_one_implementation():
    layer = ternarize(MoE(D, impl="grouped", **EXPERTS))
    assert type(layer.experts) is TernaryExperts
    with pytest.raises(ValueError, match="impl is 'grouped'; ternary experts have one"):
        layer(torch.randn(B, T, D))
