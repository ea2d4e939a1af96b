"""Converted models with sliding windows, LoRA adapters, and weights spread or offloaded."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conversions import MH_MOE, QUERY_NORM, TWO_STAGE
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from headwise import convert, record_routing
from headwise.hf.checkpointing import checkpoint_activations

CONVERSIONS = {
    "query_norm": {"attention": QUERY_NORM},
    "two_stage": {"attention": TWO_STAGE},
    "groups": {"attention": replace(QUERY_NORM, shared=0, active=3, route_groups=True)},
    "experts": {"mlp": replace(MH_MOE, shared_expert_dim=5)},
}
# PEFT asks transformers under names that it now warns about.
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def lora(model, targets=("q_proj", "v_proj"), **options):
    options |= {"target_modules": targets, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))


@pytest.fixture(params=CONVERSIONS.values(), ids=CONVERSIONS)
def conversion(request):
    return request.param


@pytest.fixture
def long_ids():
    return torch.randint(3, 31, (2, 13), generator=torch.Generator().manual_seed(2))


WINDOW = 5


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding_window"])
@pytest.mark.parametrize("length", [3, 13], ids=["prompt in the window", "prompt past it"])
@pytest.mark.parametrize("padded", [0, 2])
def test_a_sliding_window_generates_as_without_a_cache(
    tiny, long_ids, conversion, cache, length, padded
):
    model = convert(tiny("mistral", sliding_window=WINDOW), **conversion)
    ids = long_ids[:, :length]
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 9, "do_sample": False,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    without = model.generate(ids, use_cache=False, **options)
    got = model.generate(ids, cache_implementation=cache, **options)
    assert torch.equal(got.sequences, without.sequences)
    assert_close(got.logits, without.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[3, 1, 9], [7, 1, 5], [2, 2, 2, 7]], ids=str)
def test_a_sliding_window_reads_in_pieces_as_at_once(tiny, long_ids, conversion, pieces):
    model = convert(tiny("mistral", sliding_window=WINDOW), **conversion)
    cache, logits = None, []
    for piece in long_ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), model(long_ids).logits, rtol=1e-4, atol=1e-5)


@OLD_NAMES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_only_its_own(tiny, ids, conversion, checkpointing):
    model = convert(tiny(), **conversion)
    before = copy.deepcopy(model.state_dict())
    if checkpointing:
        checkpoint_activations(model)
    adapted = lora(model).train()
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == (name in adapters)
    with torch.no_grad():
        start = adapted(input_ids=ids).logits
        torch.optim.SGD(adapters.values(), lr=0.1).step()
        assert not torch.equal(adapted(input_ids=ids).logits, start)
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@OLD_NAMES
def test_lora_saves_loads_and_merges(tiny, ids, conversion, tmp_path):
    convert(tiny(), **conversion).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = lora(base).eval()
    want = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, want)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids).logits, want)
    merged = adapted.merge_and_unload()
    assert_close(merged(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model(input_ids=ids).logits, merged(input_ids=ids).logits)


@OLD_NAMES
def test_lora_on_all_linear_layers_leaves_the_router_and_can_train_it_whole(tiny, ids):
    for options in ({}, {"modules_to_save": ["router"]}):
        model = convert(tiny(), **CONVERSIONS["two_stage"])
        adapted = lora(model, "all-linear", **options).train()
        adapted(input_ids=ids, labels=ids).loss.backward()
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        assert any(".router." in name for name in trained) == bool(options)
        assert all(adapted.get_parameter(name).grad is not None for name in trained)
        with record_routing(adapted) as routings:
            adapted(input_ids=ids)
        assert len(routings) == 2


SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.mark.works_with("Accelerate", "device maps")
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", SPLIT], ids=["cpu", "auto", "split"])
def test_a_device_map_changes_nothing(tiny, ids, conversion, tmp_path, device_map):
    model = convert(tiny(), **conversion)
    model.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.is_meta for p in spread.parameters()) == (device_map is SPLIT)
    assert torch.equal(spread(ids).logits, model(ids).logits)
    with record_routing(spread) as routings:
        spread(ids)
    assert len(routings) == 2
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(spread.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.works_with("Accelerate", "weights offloaded to memory or disk")
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloading_every_weight_changes_nothing(tiny, ids, conversion, tmp_path, to):
    model = convert(tiny(), **conversion)
    want = model(ids).logits
    if to == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(ids).logits, want)


def test_an_offloaded_original(tiny, ids, conversion):
    model = tiny()
    cpu_offload(model, execution_device="cpu")
    new_weights = conversion not in (CONVERSIONS["query_norm"], CONVERSIONS["groups"])
    if new_weights:
        with pytest.raises(ValueError, match=r"weights are offloaded.*without device_map"):
            convert(model, **conversion)
    else:
        want = convert(tiny(), **conversion)(ids).logits
        assert torch.equal(convert(model, **conversion)(ids).logits, want)
