"""The DiT: reduced to plain attention, its inputs independent, guided, saved, counted, refused."""

import math
import re

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from gradients import assert_checkpointing_changes_none
from headwise import balance_loss, record_routing
from headwise.models import DiT, DiTConfig
from headwise.models.dit.config import PRESETS
from headwise.models.dit.model import sin_cos_positions
from headwise.parity import count_flops, count_parameters, measure_flops

SIDE, CLASSES, LAYERS = 6, 5, 3
SIZES = {
    "input_size": SIDE, "patch_size": 2, "in_channels": 4, "hidden_size": 28, "head_dim": 7,
    "num_hidden_layers": LAYERS, "num_labels": CLASSES, "num_heads": [2, 3, 5],
}  # fmt: skip
# The first layer weighs its heads, all of which are on; the others route.
ROUTED = {"shared_heads": [2, 1, 2], "active_heads": [2, 2, 4]}
MODELS = {"dense": {}, "routed": ROUTED}
BOTH = pytest.mark.parametrize("name", MODELS)


def tiny(name: str = "routed", **changes: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(**SIZES | MODELS[name] | changes)).eval()
    # As it starts, its output is 0.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0, 501, 999, 17])[:batch], torch.tensor([4, 0, CLASSES, 2])[:batch]


def evened(model: DiT) -> DiT:
    """With all scores of the routers even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.zero_()
    return model


def test_all_heads_on_with_even_gates_is_the_dense_model():
    model = evened(tiny(shared_heads=[2, 1, 2], active_heads=[2, 3, 5]))
    weights = {n: t for n, t in model.state_dict().items() if ".router." not in n}
    dense = tiny("dense")
    dense.load_state_dict(weights)
    assert_close(model(*inputs()), dense(*inputs()))


def test_the_dense_model_is_the_papers_equations():
    model, (x, t, y) = tiny("dense").double(), inputs()
    x = x.double()
    weights = dict(model.named_parameters())

    def linear(name, values):
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    angles = torch.outer(t.double(), 10_000 ** -(torch.arange(128).double() / 128))
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = linear("time_embedding.down", silu(linear("time_embedding.up", time)))
    c = silu(time + weights["label_embedding.weight"][y])
    tokens = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in (0, 2, 4) for j in (0, 2, 4)]
    z = linear("patch_embedding", torch.stack(tokens, dim=1)) + weights["positions"]
    for layer, heads in enumerate(SIZES["num_heads"]):
        block = f"blocks.{layer}"
        b1, g1, a1, b2, g2, a2 = linear(f"{block}.modulation", c)[:, None].chunk(6, -1)
        h = (1 + g1) * layer_norm(z, [28], eps=1e-6) + b1
        q, k, v = (
            linear(f"{block}.attention.{p}_proj", h).unflatten(-1, (heads, 7)).transpose(1, 2)
            for p in "qkv"
        )
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = z + a1 * linear(f"{block}.attention.o_proj", h)
        h = (1 + g2) * layer_norm(z, [28], eps=1e-6) + b2
        z = z + a2 * linear(f"{block}.mlp.2", gelu(linear(f"{block}.mlp.0", h), approximate="tanh"))
    shift, scale = linear("final_layer.modulation", c)[:, None].chunk(2, -1)
    z = linear("final_layer.linear", (1 + scale) * layer_norm(z, [28], eps=1e-6) + shift)
    want = torch.empty(3, 8, SIDE, SIDE, dtype=torch.float64)
    for token in range(9):
        i, j = 2 * (token // 3), 2 * (token % 3)
        want[:, :, i : i + 2, j : j + 2] = z[:, token].view(3, 2, 2, 8).permute(0, 3, 1, 2)
    # The model's angles are float32.
    assert_close(model(x, t, y), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_positions_by_hand():
    column, row = torch.tensor([1.0, 0.01]), torch.tensor([2.0, 0.02])
    want = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
    assert_close(sin_cos_positions(8, 3)[2 * 3 + 1], want)


@BOTH
def test_images_do_not_depend_on_batch_mates(name):
    model, given = tiny(name), inputs(4)
    alone = [model(*(values[i : i + 1] for values in given)) for i in range(4)]
    assert_close(model(*given), torch.cat(alone))


@BOTH
def test_image_time_class_and_place_count(name):
    model, (x, t, y) = tiny(name), inputs(1)
    want = model(x, t, y)
    assert not torch.isclose(model(x.roll(2, dims=-1), t, y), want.roll(2, dims=-1)).all()
    for changed in (model(x, t + 1, y), model(x, t, y - 1), model(x + 1, t, y)):
        assert not torch.isclose(changed, want).all()


def test_it_starts_at_0_and_as_the_paper_says():
    model = DiT(DiTConfig(**SIZES | MODELS["routed"]))
    assert not model(*inputs()).any()
    big = DiT(DiTConfig.preset("moh-dit-test", hidden_size=192, num_hidden_layers=1))
    block = big.blocks[0]
    deviations = {
        big.patch_embedding: math.sqrt(2 / (4 + 192)),
        block.attention.q_proj: math.sqrt(2 / (192 + 3 * 192)),
        block.attention.o_proj: math.sqrt(2 / (192 + 192)),
        block.attention.router.routed: math.sqrt(2 / (192 + 4)),
        block.mlp[0]: math.sqrt(2 / (192 + 768)),
        big.time_embedding.up: 0.02,
        big.label_embedding: 0.02,
    }
    for part, deviation in deviations.items():
        assert part.weight.std().item() == pytest.approx(deviation, rel=0.06)
    for part in (block.modulation, big.final_layer.modulation, big.final_layer.linear):
        assert not part.weight.any()
    assert not any(p.any() for n, p in big.named_parameters() if n.endswith("bias"))


@BOTH
def test_a_step_reaches_every_parameter(name):
    model = tiny(name).train()
    x, t, y = torch.randn(16, 4, SIDE, SIDE), torch.arange(16) * 61, torch.arange(16) % CLASSES
    with record_routing(model) as routings:
        output = model(x, t, y)
    (output.square().mean() + model.routing_loss(routings)).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias of keys moves all scores of a query alike. The positions are fixed.
    assert {n for n in still if "k_proj.bias" not in n} == {"positions"}
    assert not model.positions.requires_grad


def test_balance_is_the_mean_over_the_layers_that_route():
    model = tiny(balance_coefficient=0.5)
    with record_routing(model) as routings:
        model(*inputs())
    assert [r.weights.shape[-1] for r in routings.values()] == SIZES["num_heads"]
    on = [(r.weights != 0).sum(-1).unique().tolist() for r in routings.values()]
    assert on == [[2], [2], [4]]
    first, second = (balance_loss(routings[f"blocks.{i}.attention.router"]) for i in (1, 2))
    assert_close(model.routing_loss(routings), 0.5 * (first + second) / 2)
    assert tiny("dense").routing_loss({}).item() == 0


def test_classes_are_dropped_in_training_only_and_by_torchs_generator():
    model, (x, t, _) = tiny(class_dropout=0.5), inputs(1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), torch.full((64,), 2)
    null = model(x, t, torch.full((64,), CLASSES))
    assert_close(model(x, t, y), model(x[:1], t[:1], y[:1]).expand(64, -1, -1, -1))
    model.train()
    torch.manual_seed(7)
    output = model(x, t, y)
    torch.manual_seed(7)
    dropped = torch.rand(64) < 0.5
    assert 0 < dropped.sum() < 64
    assert_close(output[dropped], null[dropped])
    assert not torch.isclose(output[~dropped], null[~dropped]).flatten(1).all(1).any()
    torch.manual_seed(7)
    assert torch.equal(model(x, t, y), output)


def guided(channels: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What guidance gives, and what the class and the null class say without it."""
    model, (x, t, _) = tiny(), inputs(2)
    y, null = torch.tensor([1, 3]), torch.full((2,), CLASSES)
    # Of the second half, only its size counts.
    both = torch.cat([x, torch.full_like(x, torch.nan)])
    output = model.forward_with_cfg(both, t.repeat(2), torch.cat([y, null]), 1.5, channels)
    return output, model(x, t, y), model(x, t, null)


@pytest.mark.parametrize(("channels", "count"), [(3, 3), (1, 1), (None, 4), (7, 4)])
def test_guidance_of_some_channels(channels, count):
    output, of_class, of_null = guided(channels)
    want = (of_null + 1.5 * (of_class - of_null))[:, :count]
    assert_close(output[:, :count], torch.cat([want, want]))
    assert_close(output[:, count:], torch.cat([of_class, of_null])[:, count:])


@BOTH
def test_it_saves_and_loads(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, DiT)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DiTConfig)
    assert again.config.num_labels == CLASSES
    assert torch.equal(again(*inputs()), model(*inputs()))
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["positions"]
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("classes", [2, 1000])
def test_classes_are_saved_whatever_their_number(classes, tmp_path):
    DiTConfig(num_labels=classes).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == classes


def test_a_missing_weight_is_an_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = DiTConfig.from_pretrained(tmp_path)
    config.update({"num_hidden_layers": 4, "num_heads": [2, 3, 5, 5]})
    config.update({"shared_heads": [2, 1, 2, 2], "active_heads": [2, 2, 4, 4]})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit the model: .*missing_keys.*blocks\.3"):
        DiT.from_pretrained(tmp_path)


@BOTH
def test_gradient_checkpointing_changes_no_gradient(name):
    assert_checkpointing_changes_none(
        lambda: tiny(name, class_dropout=0).train(), lambda model: model(*inputs(2)).square().mean()
    )


@BOTH
def test_it_runs_in_bfloat16(name):
    want = tiny(name)(*inputs())
    output = tiny(name).bfloat16()(*inputs())
    assert output.dtype == torch.bfloat16
    assert (output - want).abs().mean() < 0.1 * want.abs().mean()


def test_it_compiles_whole():
    # The dense model: the checks of shapes in nn, which tests switch on, do not compile.
    model = tiny("dense")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs()), model(*inputs()))


COUNTS = {"s": 33, "b": 131, "l": 459, "xl": 675}


@pytest.mark.parametrize("name", [name for name in PRESETS if "test" not in name])
def test_presets_have_the_published_numbers_of_parameters(name):
    with torch.device("meta"):
        model = DiT(DiTConfig.preset(name))
    total, _ = count_parameters(model)
    size = name.removeprefix("moh-").split("-")[1]
    assert total / 1e6 == pytest.approx(COUNTS[size], abs=1)
    if name.startswith("moh"):
        share = int(name.split("-")[-1]) / 100
        budgets = model.config.budgets
        on = sum(b.active_heads for b in budgets) / sum(b.num_heads for b in budgets)
        assert on == pytest.approx(share, abs=0.02)


def test_published_budgets_of_one_preset():
    config = DiTConfig.preset("moh-dit-xl-75", num_labels=7)
    budgets = [(b.num_heads, b.shared_heads, b.top_k) for b in config.budgets]
    assert budgets == [(8, 8, 0)] * 9 + [(16, 10, 2)] * 10 + [(24, 14, 2)] * 9
    assert (config.hidden_size, config.head_dim, config.num_labels) == (1152, 72, 7)
    assert DiTConfig.preset("dit-s").num_labels == 1000
    assert DiTConfig.preset("dit-s", id2label={0: "cat", 1: "dog", 2: "owl"}).num_labels == 3


@BOTH
def test_flops_by_formula_equal_torchs_counter_less_the_heads_that_are_off(name):
    model, tokens = tiny(name), 9
    by_formula = sum(count_flops(model, sequence_length=tokens).values())
    with torch.no_grad():
        measured = measure_flops(lambda: model(*inputs())) / (3 * tokens)
    off = 0 if name == "dense" else (1 + 1) * 4 * 7 * tokens
    # Routers multiply by rows of zeros, up to 16, and have 2, 2 + 1 + 2 and 3 + 2 + 2 of their own.
    zeros = 0 if name == "dense" else 2 * 28 * (14 + 12 + 9)
    assert by_formula == pytest.approx(measured - off - zeros, rel=1e-9)


IMAGES = torch.zeros(2, 4, 6, 6)
GOOD_INPUTS = {"x": IMAGES, "t": torch.zeros(2), "y": torch.zeros(2).long()}
BAD_INPUTS = [
    ({"x": torch.zeros(2, 3, 6, 6)}, "x has shape [2, 3, 6, 6]"),
    ({"x": torch.zeros(2, 4, 8, 6)}, "it must be [B, 4, 6, 6]"),
    ({"x": torch.zeros(4, 6, 6)}, "x has shape [4, 6, 6]"),
    ({"t": torch.tensor(3)}, "t has shape []"),
    ({"y": torch.zeros(3).long()}, "y has shape [3]"),
    ({"y": torch.tensor([0, 6])}, "lie in 0..5"),
    ({"x": IMAGES.int()}, "x is torch.int32"),
    ({"y": torch.zeros(2)}, "y is torch.float32"),
    ({"y": torch.tensor([-1, 0])}, "y holds [-1]; classes must lie in 0..5"),
    ({"x": None}, "x is a NoneType; it must be a tensor"),
    ({"x": IMAGES.to(torch.complex64)}, "x is"),
    ({"t": 3}, "t is a int; it must be a tensor [2]"),
    ({"t": torch.zeros(2) > 0}, "t is torch.bool"),
    ({"y": torch.zeros(2, device="meta").long()}, "y is on meta; it must be on cpu"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS, ids=[m for _, m in BAD_INPUTS])
def test_inputs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny()(**GOOD_INPUTS | changes)


def test_without_class_dropout_there_is_no_null_class():
    x, t, _ = inputs(2)
    with pytest.raises(ValueError, match=r"lie in 0\.\.4"):
        tiny(class_dropout=0)(x, t, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="x has 3 images; guidance takes two halves"):
        tiny().forward_with_cfg(*inputs(3), 2.0)
    with pytest.raises(ValueError, match="channels is 0"):
        tiny().forward_with_cfg(*inputs(2), 2.0, channels=0)


BAD_CONFIGS = [
    ({"patch_size": 4}, "patch_size is 4; it must divide input_size = 6"),
    ({"hidden_size": 30}, "hidden_size is 30; it must be a multiple of 4"),
    ({"head_dim": None}, "num_heads is 3; it must divide hidden_size = 28"),
    ({"num_heads": [2, 3]}, "num_heads has 2 entries; it must have num_hidden_layers = 3"),
    ({"in_channels": 0}, "in_channels is 0"),
    ({"hidden_size": 28.0}, "hidden_size is 28.0; it must be an int of at least 1"),
    ({"head_dim": 0}, "head_dim is 0; it must be an int of at least 1 or None"),
    ({"num_heads": "3"}, "num_heads is '3'; it must be an int of at least 1"),
    ({"num_labels": 0}, "num_labels is 0"),
    ({"class_dropout": 1.0}, "class_dropout is 1.0"),
    ({"mlp_ratio": 0}, "mlp_ratio is 0"),
    ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
    ({"balance_coefficient": -1}, "balance_coefficient is -1"),
    ({"shared_heads": None}, "give both, or neither"),
    ({"active_heads": [2, 2, 6]}, "active_heads is 6; it must lie in 1..5"),
    ({"active_heads": [2, 2]}, "active_heads has 2 entries"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[m for _, m in BAD_CONFIGS])
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiTConfig(**SIZES | ROUTED | changes)


def test_unknown_presets_and_fields_name_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'moh-dit-b-70'; did you mean 'moh-dit-b-"):
        DiTConfig.preset("moh-dit-b-70")
    with pytest.raises(ValueError, match="unknown field 'input_sise'; did you mean 'input_size'"):
        DiTConfig.preset("dit-s", input_sise=16)
