"""LoRA on parameters of experts and routers, and on what PEFT adapts by default."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conversions import FAMILIES, MH_MOE, MOE, QUERY_NORM, TWO_STAGE
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
from torch.testing import assert_close

from headwise import MoEConfig, MoHConfig, convert, fit, fit_experts, load, record_routing

# PEFT asks transformers under names that it now warns about.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
GATED = ("experts.gate_up_proj", "experts.down_proj")
SHARED = ("shared_expert.gate_up_proj", "shared_expert.down_proj")
FITTED = MoHConfig(router="fitted", active=4)
FITTED_EXPERTS = MoEConfig(
    num_experts=4, top_k=2, expert_dim=6, shared_expert_dim=6, router="fitted", experts_from="mlp"
)
# What is converted, and the parameters that are adapted.
CASES = {
    "experts": ({"mlp": MOE}, GATED),
    "shared expert": ({"mlp": replace(MH_MOE, shared_expert_dim=5)}, GATED + SHARED),
    "two matrices": (
        {"mlp": replace(MOE, glu=False, activation="gelu")},
        ("experts.up_proj", "experts.down_proj"),
    ),
    "router of experts": ({"mlp": MOE}, ("router.weight",)),
    "cosine": ({"mlp": replace(MOE, router="cosine")}, ("router.projection", "router.embedding")),
    "fitted router of experts": ({"mlp": FITTED_EXPERTS}, ("router.weight", *GATED)),
    "two_stage": (
        {"attention": TWO_STAGE}, ("shared.weight", "routed.weight", "stage.weight")
    ),
    "one_stage": ({"attention": replace(TWO_STAGE, router="one_stage")}, ("routed.weight",)),
    "fitted": ({"attention": FITTED}, ("router.weight",)),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def converted(tiny, conversion):
    """The model, of which routers that are fitted are so to a text."""
    model, fitted = tiny(intermediate_size=30), dict(conversion)
    text = torch.randint(3, 31, (5, 13, 11), generator=torch.Generator().manual_seed(2))
    text = [{"input_ids": batch, "labels": batch} for batch in text]
    if conversion.get("attention") is FITTED:
        fitted["attention"] = fit(model, text, FITTED)
    if conversion.get("mlp") is FITTED_EXPERTS:
        fitted["mlp"] = fit_experts(model, text, FITTED_EXPERTS)
    return convert(model, **fitted)


def adapt(model, parameters, **options):
    options |= {"target_modules": [], "target_parameters": list(parameters)}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))


def test_a_parameter_learns_by_its_adapter(tiny, ids, case):
    conversion, parameters = case
    model = converted(tiny, conversion)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    start = model(ids).logits
    adapted = adapt(model, parameters, init_lora_weights=False)
    assert not torch.equal(adapted(ids).logits, start)
    adapted.train()
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * sum(name.endswith(parameters) for name in before) > 0
    # Steps so small that no choice flips, at which the loss would jump.
    optimizer = torch.optim.SGD(learning.values(), lr=0.005)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in learning.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with record_routing(adapted) as routings:
        adapted(input_ids=ids, labels=ids)
    assert len(routings) == 2
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


ROUTERS = {name: case for name, case in CASES.items() if "experts.down_proj" not in case[1]}


@pytest.mark.parametrize("case", ROUTERS.values(), ids=ROUTERS)
def test_an_adapter_of_a_router_gets_the_gradient_of_its_weight(tiny, ids, case):
    conversion, parameters = case
    adapted = adapt(converted(tiny, conversion), parameters, init_lora_weights=False).train()
    merged = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    for model in (adapted, merged):
        model(input_ids=ids, labels=ids).loss.backward()
    scale = 8 / 2  # lora_alpha over r
    wrappers = {n: m for n, m in adapted.named_modules() if isinstance(m, ParamWrapper)}
    assert wrappers
    for name, wrapper in wrappers.items():
        place = name.removeprefix("base_model.model.").replace(".base_layer", "")
        of_weight = merged.get_parameter(f"{place}.{wrapper.parameter_name}").grad
        a, b = (side["default"].weight for side in (wrapper.lora_A, wrapper.lora_B))
        assert_close(b.grad, scale * of_weight @ a.T, rtol=1e-5, atol=1e-7)
        assert_close(a.grad, scale * b.T @ of_weight, rtol=1e-5, atol=1e-7)


@pytest.mark.works_with("PEFT", "LoRA on experts and routers: saved, loaded, merged")
def test_adapters_are_saved_loaded_and_merged(tiny, ids, case, tmp_path):
    conversion, parameters = case
    converted(tiny, conversion).save_pretrained(tmp_path / "model")
    adapted = adapt(load(tmp_path / "model"), parameters, init_lora_weights=False).eval()
    want = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, want)
    merged = adapted.merge_and_unload()
    assert_close(merged(ids).logits, want, rtol=1e-5, atol=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_sees_the_adapter(tiny, ids, name):
    model = convert(tiny(), mlp=replace(MH_MOE, expert_dim=12))
    adapted = adapt(model, GATED, init_lora_weights=False).eval()
    want = adapted(ids).logits
    model.set_experts_implementation(name)
    assert_close(adapted(ids).logits, want, rtol=1e-5, atol=1e-5)


def default_targets(model):
    # GPT-2's linear maps are the other way round.
    config = LoraConfig(fan_in_fan_out="GPT2" in type(model).__name__)
    return get_peft_model(model, config).peft_config["default"].target_modules


def tiny_of(family):
    config_class, model_class, sizes = FAMILIES[family]
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))


@pytest.mark.works_with("PEFT", "default targets")
@pytest.mark.parametrize("family", ["Llama", "BERT", "GPT-2", "Qwen3", "GPT-NeoX"])
def test_without_targets_peft_adapts_what_it_does_in_the_original(family):
    model = convert(tiny_of(family), attention=QUERY_NORM)
    want = set(OF_PEFT[model.config.base_model_type])
    # In between another model, whose targets are others.
    other = convert(tiny_of("Llama" if family == "BERT" else "BERT"), attention=QUERY_NORM)
    assert default_targets(other) != want
    assert default_targets(model) == want == default_targets(tiny_of(family))


def test_without_targets_a_loaded_model_learns(tiny, ids, tmp_path):
    convert(tiny(), attention=TWO_STAGE, mlp=MOE).save_pretrained(tmp_path)
    model = load(tmp_path)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.train()(ids, labels=ids).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(learning) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in learning)


def test_a_family_that_peft_does_not_know_is_its_own_error(tiny):
    assert default_targets(convert(tiny(), attention=QUERY_NORM)) == {"q_proj", "v_proj"}
    sizes = FAMILIES["Llama"][2] | {"num_experts": 7, "num_experts_per_tok": 2}
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        default_targets(convert(model, attention=QUERY_NORM))


def test_importing_headwise_does_not_import_peft():
    code = "import sys, headwise; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
