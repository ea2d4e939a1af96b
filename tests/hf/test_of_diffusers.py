"""diffusers' models converted: exact, off as budgeted, trained, saved, loaded, sampled, refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conversions import LEARNED, TWO_STAGE
from torch.testing import assert_close

import headwise.hf
from damage import edit_json, edit_weights
from headwise import MHMoEConfig, MoHConfig, balance_loss, calibrate, convert, record_routing
from headwise.hf import Conversion
from headwise.nn import QueryNormRouter
from headwise.parity import count_flops, measure_flops

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

# diffusers makes numpy arrays of torch's tensors in a way that numpy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEADS, WIDTH, CHANNELS, SIDE, TEXT_WIDTH = 5, 4, 4, 6, 11
TOKENS = (SIDE // 2) ** 2
DIT, PIXART, UNET = "DiTTransformer2DModel", "PixArtTransformer2DModel", "UNet2DConditionModel"
SIZES = {
    "num_attention_heads": HEADS, "attention_head_dim": WIDTH, "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS, "num_layers": 2, "sample_size": SIDE,
}  # fmt: skip
FAMILIES = {
    DIT: SIZES,
    PIXART: SIZES | {"cross_attention_dim": HEADS * WIDTH, "caption_channels": TEXT_WIDTH},
    UNET: {
        "in_channels": CHANNELS, "block_out_channels": (HEADS * WIDTH,), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": HEADS, "cross_attention_dim": TEXT_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
    },
}  # fmt: skip
TEXT = torch.randn(2, 13, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
CONDITIONS = {
    DIT: {"class_labels": torch.tensor([1, 6])},
    PIXART: {
        "encoder_hidden_states": TEXT,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "attention_mask": torch.ones(2, TOKENS),
    },
    UNET: {"encoder_hidden_states": TEXT},
}
LEGACY = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 7, "patch_size": 2}
EXPERTS = MHMoEConfig(num_heads=2, num_experts=3, top_k=1, expert_dim=7)
ROUTERS = {
    "query_norm": MoHConfig(router="query_norm", shared=2, active=3),
    "two_stage": TWO_STAGE,
    "one_stage": MoHConfig(
        router="one_stage", shared=1, active=3, balance_coefficient=0.5, router_std=0.02
    ),
}


def tiny(family=DIT):
    torch.manual_seed(0)
    model = getattr(diffusers, family)(**FAMILIES[family]).eval()
    # As they are, tiny models attend almost evenly and heads hardly differ.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn1.to_" in name and parameter.ndim > 1:
                parameter.mul_(4)
    return model


def run(model, family=DIT):
    images = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    given = CONDITIONS[family].copy()
    if "encoder_hidden_states" in given:
        given["encoder_hidden_states"] = TEXT.to(model.dtype)
    return model(images.to(model.dtype), timestep=torch.tensor([3, 700]), **given).sample


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_heads_on_it_is_the_original(family):
    original = tiny(family)
    want = run(original, family)
    for config in (
        MoHConfig(router="query_norm", shared=HEADS, active=HEADS),
        MoHConfig(router="query_norm", shared=1, active=HEADS),
        MoHConfig(shared=HEADS, active=HEADS, router_std=0.0, router="two_stage"),
    ):
        model = convert(copy.deepcopy(original), attention=config)
        assert isinstance(model, type(original))
        with record_routing(model) as routings:
            got = run(model, family)
        assert all((routing.weights == 1).all() for routing in routings.values())
        assert_close(got, want)
    assert set(model.state_dict()) >= set(original.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_off_as_budgeted_and_cross_attention_is_left_alone(family):
    original = tiny(family)
    names = [f"{n}.router" for n, _ in original.named_modules() if n.endswith("attn1")]
    layers = len(names)
    shared, active = [[0, 3], *[[1]] * (layers - 1)], [4, *[2] * (layers - 1)]
    config = MoHConfig(router="query_norm", shared=shared, active=active)
    model = convert(original, attention=config)
    with record_routing(model) as routings:
        run(model, family)
    assert set(routings) == set(names)
    for name, of_layer, on in zip(names, shared, active, strict=True):
        assert ((routings[name].weights != 0).sum(-1) == on).all()
        assert (routings[name].weights[..., of_layer] == 1).all()


def compute_all_heads_and_gate_them(attn, router):
    """The specification: every head by diffusers' own processor, then times its gate."""
    gates = []

    def route(_, args):
        (x,) = args
        q = attn.to_q(x).unflatten(-1, (HEADS, WIDTH))
        gate = router(q if isinstance(router, QueryNormRouter) else x).weights
        # A head that is off has no gradient.
        gates.append(torch.where(gate != 0, gate, 0).repeat_interleave(WIDTH, -1))

    attn.register_forward_pre_hook(route)
    attn.to_out[0].register_forward_pre_hook(lambda _, args: (args[0] * gates.pop(),))


@pytest.mark.parametrize("router", ROUTERS)
def test_heads_are_gated_before_the_output_projection(router):
    reference = tiny().double()
    model = convert(copy.deepcopy(reference), attention=ROUTERS[router])
    routers = {n: copy.deepcopy(m) for n, m in model.named_modules() if n.endswith("router")}
    for name, its_router in routers.items():
        attention = reference.get_submodule(name.removesuffix(".router"))
        compute_all_heads_and_gate_them(attention, its_router)
    got, want = run(model), run(reference)
    assert_close(got, want)
    weights = torch.randn_like(want)
    for y in (got, want):
        (y * weights).sum().backward()
    for name, parameter in reference.named_parameters():
        assert_close(model.get_parameter(name).grad, parameter.grad)
    for name, its_router in routers.items():
        for part, parameter in its_router.named_parameters():
            assert_close(model.get_parameter(f"{name}.{part}").grad, parameter.grad)


def test_the_balance_losses_train_the_routers():
    model = convert(tiny(), attention=ROUTERS["one_stage"]).train()
    with record_routing(model) as routings:
        noise = run(model)
    loss = model.routing_loss(routings)
    first, second = routings.values()
    assert_close(loss, 0.5 * (balance_loss(first) + balance_loss(second)) / 2)
    (noise.square().mean() + loss).backward()
    routers = {n: p.grad for n, p in model.named_parameters() if ".router." in n}
    assert len(routers) == 2
    assert all(grad.abs().sum() > 0 for grad in routers.values())


def test_balance_is_the_mean_over_the_layers_that_route():
    config = replace(TWO_STAGE, shared=[2, HEADS], active=[4, HEADS], balance_coefficient=0.5)
    model = convert(tiny(), attention=config)
    with record_routing(model) as routings:
        run(model)
    first, without_choice = routings.values()
    assert without_choice.probabilities.shape[-1] == 0
    assert_close(model.routing_loss(routings), 0.5 * balance_loss(first))
    assert model.routing_loss({}).item() == 0


@pytest.mark.parametrize("router", ["query_norm", "two_stage"])
def test_gradient_checkpointing_changes_no_gradient(router):
    results = []
    for checkpointing in (False, True):
        model = convert(tiny(), attention=replace(TWO_STAGE, router=router, active=3))
        if checkpointing:
            model.enable_gradient_checkpointing()
        with record_routing(model) as routings:
            run(model).square().mean().backward()
        assert len(routings) == 2
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        torch.manual_seed(0)
    assert_close(*results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_it_saves_and_loads(family, router, tmp_path):
    model = convert(tiny(family), attention=ROUTERS[router])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == f"Routed{family}"
    assert config["headwise"] == json.loads(json.dumps(model.conversion.to_dict()))
    again = getattr(headwise.hf, f"Routed{family}").from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.conversion == model.conversion == Conversion(attention=ROUTERS[router])
    assert torch.equal(run(again, family), run(model, family))
    again.save_pretrained(tmp_path / "twice")
    twice = type(model).from_pretrained(tmp_path / "twice", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in twice.parameters()} == {torch.bfloat16}
    assert run(twice, family).isfinite().all()


ROUTER = "transformer_blocks.1.attn1.router.routed.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(ROUTER), f"missing_keys.*{ROUTER}"),
        (lambda w: w.update(surplus=torch.zeros(3)), "unexpected_keys.*surplus"),
        (lambda w: w.update({ROUTER: torch.zeros(2, 7)}), f"mismatched_keys.*{ROUTER}"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(edit, message, tmp_path):
    model = convert(tiny(), attention=ROUTERS["two_stage"])
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, edit, "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    model = convert(tiny(), attention=ROUTERS["two_stage"])
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config["headwise"].update(format=99))
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        type(model).from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.pop("headwise"))
    with pytest.raises(ValueError, match=r"config.json's 'headwise' is not understood"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.works_with("diffusers", "a pipeline samples, saves and loads")
def test_diffusers_own_pipeline_samples_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=2 * SIDE,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(tiny(), vae, scheduler)
    pipe.transformer = convert(pipe.transformer, attention=ROUTERS["two_stage"])
    assert pipe.config["transformer"] == ("headwise.hf", f"Routed{DIT}")
    pipe.save_pretrained(tmp_path)
    pictures = []
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DiTPipeline
    alone = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    for given in (pipe, loaded, diffusers.DiTPipeline(alone, vae, scheduler)):
        given.set_progress_bar_config(disable=True)
        with record_routing(given.transformer) as routings:
            pictures += given(
                [3, 5, 2], num_inference_steps=2, output_type="pt",
                generator=torch.Generator().manual_seed(4),
            ).images.unsqueeze(0)  # fmt: skip
        # Three images, and three without a class.
        assert [r.weights.shape for r in routings.values()] == [(6, TOKENS, HEADS)] * 2
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_flops_equal_torchs_counter_less_the_heads_that_are_off():
    dense = tiny()
    with torch.no_grad():
        seen = measure_flops(lambda: run(dense)) / (2 * TOKENS)
    dim = HEADS * WIDTH
    again = 2 * (256 * dim + dim * dim) / TOKENS  # the time's embedding, for the output
    by_formula = sum(count_flops(dense, sequence_length=TOKENS).values())
    assert by_formula == pytest.approx(seen - again, rel=1e-6)
    model = convert(dense, attention=ROUTERS["query_norm"])
    off = 2 * 2 * 4 * WIDTH * TOKENS  # two layers with two heads of five
    assert sum(count_flops(model, sequence_length=TOKENS).values()) == by_formula - off
    with pytest.raises(ValueError, match=r"attn2 is cross attention; count_flops has"):
        count_flops(tiny(PIXART), sequence_length=TOKENS)


def test_what_cannot_be_converted_is_refused_and_left_alone():
    model = tiny()
    with pytest.raises(ValueError, match=r"of which attention alone can be converted; mlp must"):
        convert(model, attention=LEARNED, mlp=EXPERTS)
    with pytest.raises(ValueError, match=r"attention alone can be converted; .* ternary False"):
        convert(model, ternary=True)
    with pytest.raises(ValueError, match="layer 1: active is 6"):
        convert(model, attention=replace(LEARNED, shared=1, active=[3, 6]))
    assert type(model) is diffusers.DiTTransformer2DModel
    assert not any("router" in name for name, _ in model.named_modules())
    assert "headwise" not in model.config
    converted = convert(model, attention=LEARNED)
    with pytest.raises(ValueError, match=r"RoutedDiT.* is converted already; load the original"):
        convert(converted, attention=LEARNED)
    pipe = diffusers.DDIMPipeline(tiny(UNET), diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match=r"a DDIMPipeline; give a model of it"):
        convert(pipe, attention=LEARNED)


def test_what_takes_models_of_transformers_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"model is a DiT.*; it must be a transformers model"):
        calibrate(tiny(), [{}], LEARNED, by="query_norm")
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"it is a {DIT} of diffusers; load it with that class"):
        convert(tmp_path, attention=LEARNED)


def test_models_whose_attention_is_another_are_refused():
    own = type("OwnDiT", (diffusers.DiTTransformer2DModel,), {})(**SIZES)
    with pytest.raises(ValueError, match="OwnDiT cannot be converted: diffusers has no class"):
        convert(own, attention=LEARNED)
    legacy = diffusers.Transformer2DModel(**SIZES | LEGACY)
    with pytest.raises(ValueError, match=r"Transformer2DModel cannot be .* DiTTransformer2DModel"):
        convert(legacy, attention=LEARNED)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(
        ValueError, match=r"attentions\.0 is a Attention with AttnProcessor2_0, and"
    ):
        convert(vae, attention=LEARNED)
    without = diffusers.AutoencoderTiny()
    with pytest.raises(ValueError, match=r"AutoencoderTiny cannot be .* no self-attention"):
        convert(without, attention=LEARNED)


def test_a_processor_or_a_sequence_that_would_pass_by_the_routers_is_refused():
    model = convert(tiny(), attention=LEARNED)
    attn = model.transformer_blocks[1].attn1
    x = torch.randn(2, TOKENS, HEADS * WIDTH)
    with pytest.raises(ValueError, match="encoder_hidden_states is given; routed heads attend to"):
        attn(x, encoder_hidden_states=x)
    attn.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="processor is a AttnProcessor2_0; a model with routed"):
        run(model)


def test_a_name_that_is_no_model_of_diffusers_is_no_attribute():
    for name in ("RoutedNothing", "RoutedDDIMScheduler", "nothing"):
        with pytest.raises(AttributeError, match=f"module 'headwise.hf' has no attribute '{name}'"):
            getattr(headwise.hf, name)
