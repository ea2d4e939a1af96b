"""Models whose attention multiplies heads by gates already: the largest stay, as they are."""

import copy

import pytest
import torch
import transformers
from conversions import EAGER
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close

from headwise import MoHConfig, convert, fit, load, record_routing, restore
from headwise.hf.surgery import attention_modules
from headwise.nn import HeadBudget, OutputGateRouter
from tiny import llama

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
WINDOWED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}  # fmt: skip
LAGUNA = WINDOWED | {
    "num_experts": 4, "shared_expert_intermediate_size": 8,
    "num_attention_heads_per_layer": [6, 4, 6],
}  # fmt: skip
# Config, model class and what it has beside the sizes of all.
FAMILIES = {
    "Lfm3": ("Lfm3", {"layer_types": ["full_attention", "conv", "sliding_attention"]}),
    "Laguna": ("Laguna", EXPERTS | LAGUNA),
    "Laguna by channel": ("Laguna", EXPERTS | LAGUNA | {"gating": "per-element"}),
    "Qwen3-Next": (
        "Qwen3Next", EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 8},
    ),
    "Qwen3.5": ("Qwen3_5Text", LINEAR),
    "Step3.7": (
        "Step3p7", EXPERTS | WINDOWED
        | {"n_routed_experts": 4, "share_expert_dim": 8, "mlp_layer_types": ["dense"] * 3},
    ),
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))


def tiny(family):
    kind, fields = FAMILIES[family]
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Step3p7' else ''}Config", None)
    if config is None:
        pytest.skip(f"needs a transformers that has {kind}")
    torch.manual_seed(0)
    config = config(**SIZES | fields)
    if kind == "Step3p7":
        vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 6, "image_size": 28, "patch_size": 14}  # fmt: skip
        whole = transformers.Step3p7Config(
            text_config=config.to_dict(), vision_config=vision, image_token_id=60
        )
        model = transformers.Step3p7ForConditionalGeneration(whole)
    else:
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(10)
    return model.eval()


def converted(family, active):
    model = tiny(family)
    layers = [i for i, name in enumerate(attention_modules(model)) if "vision" not in name]
    return convert(model, attention=MoHConfig(router="output_gate", active=active), layers=layers)


FAMILY = pytest.mark.parametrize("family", FAMILIES)


@FAMILY
@torch.no_grad()
def test_with_all_heads_on_it_is_the_original_bit_for_bit(family):
    original = tiny(family)
    original.set_attn_implementation("sdpa")
    assert torch.equal(converted(family, 1.0)(IDS).logits, original(IDS).logits)


@FAMILY
@torch.no_grad()
def test_the_largest_gates_stay_as_they_are(family):
    """Of each layer: what the output map reads is the original's, and 0 for the smallest gates."""
    model = converted(family, 0.5)
    seen = {}

    def keep(name):
        return lambda _, args: seen.setdefault(name, args[0])

    for name, attention in attention_modules(model).items():
        attention.o_proj.register_forward_pre_hook(keep(name)) if "vision" not in name else None
    with record_routing(model) as routings:
        model(IDS)
    original = tiny(family)
    original.set_attn_implementation("sdpa")
    first = next(iter(seen))
    heads = {}
    original.get_submodule(first).o_proj.register_forward_pre_hook(
        lambda _, args: heads.update(z=args[0])
    )
    original(IDS)
    routing = routings[f"{first}.router"]
    on = (routing.weights != 0).unsqueeze(-1)
    assert (on.sum(2) == routing.weights.shape[-1] // 2).all()
    want = heads["z"].unflatten(-1, (on.shape[2], -1)) * on
    assert_close(seen[first].unflatten(-1, (on.shape[2], -1)), want)
    assert set(routing.weights.unique().tolist()) == {0.0, 1.0}
    on, gates = on.squeeze(-1), routing.logits
    assert (gates.where(on, torch.inf).amin(-1) >= gates.where(~on, -torch.inf).amax(-1)).all()


@FAMILY
@torch.no_grad()
def test_it_generates_with_a_cache_as_without(family):
    model = converted(family, 0.5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    without = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, **options), without)


@FAMILY
@torch.no_grad()
def test_it_saves_loads_and_goes_back(family, tmp_path):
    model = converted(family, 0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"load it by headwise\.load"):
        type(tiny(family)).from_pretrained(tmp_path, **EAGER)
    again = load(tmp_path)
    assert again.conversion == model.conversion
    deviation = tiny(family).config.get_text_config().initializer_range
    assert again.config.get_text_config().initializer_range == deviation
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert set(restore(again).state_dict()) == set(again.state_dict())


@FAMILY
def test_gates_learn_as_before(family):
    model = converted(family, 0.5).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    projection = "q_proj" if "Qwen" in family else "g_proj"
    for name, parameter in model.named_parameters():
        if projection in name and "vision" not in name:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@FAMILY
@torch.no_grad()
def test_a_gated_model_can_be_fitted_too(family):
    model = tiny(family)
    layers = [i for i, name in enumerate(attention_modules(model)) if "vision" not in name]
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(3, 60, (8, 3, 13))]
    heads = fit(model, batches, MoHConfig(router="fitted", active=0.5), layers=layers)
    original = model(IDS).logits
    half = convert(copy.deepcopy(model), attention=heads)(IDS).logits
    by_norm = MoHConfig(router="query_norm", shared=0, active=0.5)
    other = convert(copy.deepcopy(model), attention=by_norm, layers=layers)(IDS).logits
    assert (half - original).norm() < (other - original).norm()


def test_where_there_is_no_gate_it_is_refused():
    config = MoHConfig(router="output_gate")
    with pytest.raises(ValueError, match="a LlamaAttention, has no gate on"):
        convert(llama(), attention=config)
    if not hasattr(transformers, "Lfm3Config"):
        pytest.skip("needs a transformers that has Lfm3")
    _, fields = FAMILIES["Lfm3"]
    without = transformers.Lfm3Config(**SIZES | fields | {"use_attention_gate": False})
    with pytest.raises(ValueError, match="a Lfm3Attention, has no gate on"):
        convert(transformers.Lfm3ForCausalLM(without), attention=config)
    with pytest.raises(ValueError, match="a Step3p7VisionAttention, has no gate on"):
        convert(tiny("Step3.7"), attention=config)


def test_gates_of_groups_and_shared_heads():
    gates = torch.tensor([[[0.1, 0.9, 0.2, 0.3, 0.8, 0.4]]])
    router = OutputGateRouter(HeadBudget.resolve(6, shared=0, active=4, num_groups=3))
    assert router(gates).weights.tolist() == [[[1, 1, 0, 0, 1, 1]]]
    router = OutputGateRouter(HeadBudget.resolve(6, shared=(0,), active=3))
    assert router(gates).weights.tolist() == [[[1, 1, 0, 0, 1, 0]]]
    router = OutputGateRouter(HeadBudget.resolve(6, shared=6, active=6))
    assert (router(gates).weights == 1).all()
    with pytest.raises(ValueError, match="gates"):
        router(gates[..., :5])
