"""Projections of converted models that leave out heads that are off: which do, and what they give.

Every model is compared with itself, computing all queries and outputs.
"""

import copy
import pickle

import pytest
import torch
import transformers
from conversions import QUERY_NORM, TWO_STAGE
from peft import LoraConfig, get_peft_model
from test_families import FAMILIES, GENERATING
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise import MoHConfig, convert
from headwise.bitnet import ternarize
from headwise.nn.bitlinear import BitLinear
from headwise.nn.projections import OutputProjection, QueryProjection

pytestmark = pytest.mark.usefixtures("native_kernels")
SKIPPING = (QueryProjection, OutputProjection)
ONE_STAGE = MoHConfig(shared=2, active=4, router="one_stage", router_std=0.02)
ROUTERS = {"two_stage": TWO_STAGE, "one_stage": ONE_STAGE, "query_norm": QUERY_NORM}
# 6 heads of 64 channels, 2 of which are off.
WIDE = {"hidden_size": 96, "head_dim": 64, "max_position_embeddings": 640}
# Queries and outputs that are skipped in each family; the others are parts of something else.
SKIPPED = dict.fromkeys(("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "ViT"), (True, True))
SKIPPED |= {"GPT-2": (False, False), "GPT-NeoX": (False, True), "BERT": (True, False)}
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def wide(family="Llama", dtype=torch.float32, **changes):
    """A model whose heads have 48 or 64 channels and no equally long queries."""
    config, model, sizes = FAMILIES[family]
    sizes = sizes | (WIDE if "head_dim" in sizes else {"hidden_size": 288})
    if family == "ViT":
        sizes |= {"image_size": 46}
    elif "head_dim" not in sizes:
        sizes |= {"max_position_embeddings": 640}
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes | changes))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name.lower() and parameter.ndim > 1:
                parameter.mul_(3)
            elif "q_norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-1, 1)
    return built.eval().to(dtype)


def computing_all(model):
    """A copy of the model that skips nothing."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in SKIPPING:
            module.__class__ = nn.Linear
    return model


def long_inputs(family):
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 3, 46, 46)}
    return {"input_ids": torch.randint(3, 31, (2, 600))}


def flops(model, **given):
    with FlopCounterMode(display=False) as counter:
        output = model(**given)
    return output, counter.get_total_flops()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_gives_what_it_gives_without_skipping(family, router):
    model, given = convert(wide(family), attention=ROUTERS[router]), long_inputs(family)
    got, fewer = flops(model, **given)
    want, all_heads = flops(computing_all(model), **given)
    assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    queries, outputs = SKIPPED[family]
    projections = (queries and router != "query_norm") + outputs
    rows = 2 * (530 if family == "ViT" else 600)
    channels, dim = (64, 96) if model.config.hidden_size == 96 else (48, 288)
    assert all_heads - fewer == 3 * projections * 2 * rows * 2 * channels * dim


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_bfloat16(router):
    # One layer: rounding would choose other heads in a second one.
    model = wide(dtype=torch.bfloat16, num_hidden_layers=1)
    convert(model, attention=ROUTERS[router])
    given = long_inputs("Llama")
    for ids in (given["input_ids"], given["input_ids"][:1, :1]):
        got, fewer = flops(model, input_ids=ids)
        want, all_heads = flops(computing_all(model), input_ids=ids)
        largest = want.logits.abs().max().item()
        assert_close(got.logits, want.logits, rtol=0, atol=2e-2 * largest)
        assert (fewer < all_heads) == (ids.numel() > 1)


GENERATE = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
AS_TENSORS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", GENERATING)
def test_the_same_text_is_generated(family, cache):
    model = convert(wide(family), attention=TWO_STAGE)
    for rows, length, padded in ((1, 5, 0), (2, 600, 4)):
        ids = torch.randint(3, 31, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, :padded] = 0
        given = {"attention_mask": mask, **cache, **GENERATE, **AS_TENSORS}
        got, want = (m.generate(ids, **given) for m in (model, computing_all(model)))
        assert torch.equal(got.sequences, want.sequences)
        assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_one_token_reads_the_weights_of_heads_that_are_on(router):
    model = convert(wide(), attention=ROUTERS[router])
    ids = torch.randint(3, 31, (1, 7))
    counts = []
    for each in (model, computing_all(model)):
        cache = each(ids, use_cache=True).past_key_values
        counts.append(flops(each, input_ids=ids[:, :1], past_key_values=cache)[1])
    projections = 1 if router == "query_norm" else 2
    assert counts[1] - counts[0] == 3 * projections * 2 * 2 * 64 * 96


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_those_of_all_heads(router):
    model = convert(wide(), attention=ROUTERS[router])
    ids = long_inputs("Llama")["input_ids"]
    gradients = []
    for each in (model, computing_all(model)):
        loss = each(ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, list(each.parameters()), allow_unused=True))
    for got, want in zip(*gradients, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def projections_of(model):
    return {type(m) for m in model.modules()} & set(SKIPPING)


def test_parameters_keep_their_names_and_classes_are_nn_linear():
    model = convert(wide(), attention=TWO_STAGE)
    assert projections_of(model) == set(SKIPPING)
    assert list(computing_all(model).state_dict()) == list(model.state_dict())
    assert set(wide().state_dict()) <= set(model.state_dict())
    assert all(issubclass(kind, nn.Linear) for kind in SKIPPING)


@pytest.mark.parametrize(
    "again_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_copies_skip_too(again_of):
    model = convert(wide(), attention=TWO_STAGE)
    given = long_inputs("Llama")
    want, operations = flops(model, **given)
    again, of_again = flops(again_of(model), **given)
    assert torch.equal(again.logits, want.logits)
    assert of_again == operations


def test_a_loaded_model_skips_too(tmp_path):
    model = convert(wide(), attention=TWO_STAGE)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert projections_of(again) == set(SKIPPING)


def test_ternary_maps_are_left_alone():
    for model in (
        convert(wide(), attention=TWO_STAGE, ternary=True),
        ternarize(convert(wide(), attention=TWO_STAGE)),
    ):
        attention = model.model.layers[0].self_attn
        assert type(attention.q_proj) is type(attention.o_proj) is BitLinear


@OLD_NAMES
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_adapters_come_on_top(options):
    model = convert(wide(), attention=TWO_STAGE)
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, init_lora_weights=False, target_modules=("q_proj", "v_proj", "o_proj"), **options
    )
    adapted = get_peft_model(model, config).eval()
    query = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(query).__module__.startswith("peft")
    assert type(query.base_layer) is QueryProjection
    with torch.no_grad():
        for ids in (long_inputs("Llama")["input_ids"], torch.tensor([[5]])):
            assert_close(
                adapted(ids).logits, computing_all(adapted)(ids).logits, rtol=1e-4, atol=1e-4
            )
        want = adapted(ids).logits
        assert_close(adapted.merge_and_unload()(ids).logits, want, rtol=1e-4, atol=1e-4)


class Doubled(torch.Tensor):
    """A weight that stands for twice its values, as quantised ones stand for others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is linear:
            x, weight, bias = args
            return linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs or {})


@torch.no_grad()
def test_a_weight_that_is_no_plain_tensor_is_read_its_own_way():
    model = convert(wide(), attention=TWO_STAGE)
    twice = copy.deepcopy(model)
    for name in ("q_proj", "o_proj"):
        linear_map = getattr(model.model.layers[1].self_attn, name)
        linear_map.weight = nn.Parameter(linear_map.weight.detach().as_subclass(Doubled))
        getattr(twice.model.layers[1].self_attn, name).weight.mul_(2)
    given = long_inputs("Llama")
    assert_close(model(**given).logits, twice(**given).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hook_on_a_projection_is_called():
    model = convert(wide(), attention=TWO_STAGE)
    attention, seen = model.model.layers[1].self_attn, []
    for projection in (attention.q_proj, attention.o_proj):
        projection.register_forward_hook(lambda _, x, y: seen.append(y.shape[-1]) or 2 * y)
    given = long_inputs("Llama")
    got = model(**given).logits
    assert seen == [384, 96]
    assert_close(got, computing_all(model)(**given).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gates_stay_with_the_forward_that_made_them():
    model = convert(wide(), attention=TWO_STAGE)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 600, 96)
    positions = model.model.rotary_emb(x, torch.arange(600)[None])
    attention(x, position_embeddings=positions, attention_mask=None)
    assert torch.equal(attention.q_proj(x), linear(x, attention.q_proj.weight))


def test_a_norm_over_the_queries_of_all_heads_needs_them_all():
    sizes = {k: v for k, v in FAMILIES["Llama"][2].items() if k != "head_dim"}
    sizes |= {"hidden_size": 288, "max_position_embeddings": 640, "num_key_value_heads": 6}
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)).eval()
    convert(model, attention=TWO_STAGE)
    assert projections_of(model) == {OutputProjection}
    with torch.no_grad():
        given = long_inputs("Llama")
        want = computing_all(model)(**given).logits
        assert_close(model(**given).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_under_autocast_all_heads_are_computed():
    model, given = convert(wide(), attention=TWO_STAGE), long_inputs("Llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (m(**given).logits for m in (model, computing_all(model)))
    assert torch.equal(got, want)
