"""convert(ternary=True): what becomes ternary, training, saving, packing, generation."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from conversions import MH_MOE, MOE, TWO_STAGE
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from gradients import assert_checkpointing_changes_none
from headwise import MoHConfig, bitnet, convert, record_routing
from headwise.hf import restore
from headwise.nn.bitlinear import BitLinear, PackedLinear
from headwise.parity import count_flops, count_parameters
from tiny import SIZES

MIXTURE = replace(MH_MOE, shared_expert_dim=5, bias=True)
CONVERSIONS = {
    "dense": {},
    "moh": {"attention": TWO_STAGE},
    "moe": {"mlp": MOE, "every": 2},
    "both": {"attention": MoHConfig(router="query_norm"), "mlp": MIXTURE},
}


@pytest.fixture(params=CONVERSIONS)
def model(request, tiny):
    return convert(tiny(), ternary=True, **CONVERSIONS[request.param])


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_every_linear_map_of_the_layers_and_no_other(model):
    kinds = {name: type(m) for name, m in linears(model).items()}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {BitLinear}
    assert all(name.startswith("model.layers.") for name in kinds)
    names = {type(m).__name__ for m in model.modules()}
    assert not names & {"Experts", "SharedExpert"}


def test_the_layer_of_an_attention_is_what_stands_in_the_list():
    bert = BertForMaskedLM(BertConfig(**SIZES))
    kinds = {name: type(m) for name, m in linears(convert(bert, ternary=True)).items()}
    ternary = {name for name, kind in kinds.items() if kind is BitLinear}
    assert ternary == {name for name in kinds if name.startswith("bert.encoder.layer.")}
    assert len(ternary) == 2 * 6


def test_parameters_keep_their_names_and_values(tiny):
    before = copy.deepcopy(tiny().state_dict())
    after = convert(tiny(), ternary=True).state_dict()
    assert list(after) == list(before)
    assert_close(after, before, rtol=0, atol=0)


def test_it_costs_what_the_model_in_full_precision_costs(tiny, model):
    plain = convert_like(model, tiny())
    for same in (model, bitnet.pack(copy.deepcopy(model))):
        assert count_flops(same, sequence_length=7) == count_flops(plain, sequence_length=7)
        assert count_parameters(same) == count_parameters(plain)


def convert_like(model, original):
    """The same conversion in full precision."""
    done = model.conversion
    if done.attention is None and done.mlp is None:
        return original
    return convert(original, attention=done.attention, mlp=done.mlp, every=done.every)


def test_it_is_saved_and_loaded_trained_and_packed(model, ids, tmp_path):
    want = model(ids).logits
    for state in ("trained", "packed"):
        if state == "packed":
            assert bitnet.pack(model) is model
            assert torch.equal(model(ids).logits, want)
        model.save_pretrained(tmp_path / state)
        assert list(tmp_path.glob(f"{state}/*.bin")) == []
        config = json.loads((tmp_path / state / "config.json").read_text())
        assert (config["headwise"]["ternary"], config["headwise"]["format"]) == (state, 2)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / state)
        assert type(again) is type(model)
        assert again.conversion == model.conversion
        assert repr(again) == repr(model)
        assert torch.equal(again(ids).logits, want)


@pytest.mark.parametrize("saved", ["trained", "packed"])
def test_it_loads_in_another_dtype_with_bytes_and_scales_as_they_are(tiny, ids, tmp_path, saved):
    model = convert(tiny(), ternary=True, **CONVERSIONS["both"])
    if saved == "packed":
        bitnet.pack(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = again(ids).logits
    assert logits.dtype == torch.bfloat16
    if saved == "trained":
        assert torch.equal(bitnet.pack(again)(ids).logits, logits)
        again.save_pretrained(tmp_path / "packed")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert torch.equal(again(ids).logits, logits)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, buffer in buffers_of_layers(again).items():
        assert buffer.dtype == (torch.float32 if name.endswith("scale") else torch.uint8), name


def buffers_of_layers(model):
    return {name: b for name, b in model.named_buffers() if name.startswith("model.layers.")}


def test_the_file_of_a_packed_model_is_as_small_as_said(tiny, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 16}
    model = convert(tiny(**sizes).bfloat16(), ternary=True, mlp=MIXTURE, every=2)
    model.save_pretrained(tmp_path / "trained")
    bitnet.pack(model).save_pretrained(tmp_path / "packed")
    files = [tmp_path / state / "model.safetensors" for state in ("trained", "packed")]
    trained, packed = map(load_file, files)
    small = [name for name, tensor in packed.items() if tensor.dtype == torch.uint8]
    scales = sum(tensor.nbytes for name, tensor in packed.items() if name not in trained)
    saved = sum(trained[name].nbytes - packed[name].nbytes for name in small)
    # Names and shapes stand in front of the tensors; experts 11 and 5 wide fill up their bytes.
    header = 8000
    difference = files[0].stat().st_size - files[1].stat().st_size
    assert abs(difference - (saved - scales)) < header
    linear = [name for name in small if "layers.0" in name]
    assert len(linear) == 7
    assert all(trained[name].nbytes == 8 * packed[name].nbytes for name in linear)
    assert sum(trained[n].nbytes for n in small) > 7 * sum(packed[n].nbytes for n in small)


def test_a_weight_that_is_missing_or_misshapen_is_an_error(tiny, tmp_path):
    model = bitnet.pack(convert(tiny(), ternary=True))
    del model.model.layers[1].mlp.up_proj.scale
    model.model.layers[0].mlp.up_proj.weight = torch.zeros(3, 3, dtype=torch.uint8)
    model.save_pretrained(tmp_path)
    message = r"missing_keys.*layers\.1\.mlp\.up_proj\.scale.*layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_reaches_every_weight_and_lowers_the_loss(model, ids):
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_no_gradient(model, ids):
    assert_checkpointing_changes_none(
        lambda: copy.deepcopy(model).train(), lambda copied: copied(ids, labels=ids).loss
    )


@pytest.mark.parametrize("packed", [False, True])
def test_it_generates_with_a_cache_as_without_and_records(model, ids, packed):
    model = bitnet.pack(model) if packed else model
    options = {"max_new_tokens": 5, "do_sample": False}
    without = model.generate(ids, use_cache=False, **options)
    with record_routing(model) as routings:
        assert torch.equal(model.generate(ids, **options), without)
    done = model.conversion
    mixtures = 0 if done.mlp is None else 2 // done.every
    assert len(routings) == mixtures + (0 if done.attention is None else 2)


def test_tokens_do_not_depend_on_batch_mates_or_padding(model, ids, attention_mask):
    model.double()
    real = attention_mask.bool()
    logits = model(ids, attention_mask=attention_mask).logits
    changed = ids.masked_fill(~real, 5)
    assert_close(model(changed, attention_mask=attention_mask).logits[real], logits[real])
    assert_close(model(ids[:1, real[0]]).logits[0], logits[0, real[0]])
    assert_close(model(ids[1:]).logits[0], logits[1])


def test_a_converted_model_becomes_ternary_later(tiny, ids, tmp_path):
    want = convert(tiny(), ternary=True, **CONVERSIONS["moh"])
    model = bitnet.ternarize(convert(tiny(), **CONVERSIONS["moh"]))
    model.load_state_dict(want.state_dict())
    assert model.conversion == want.conversion
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model(ids).logits, want(ids).logits)


def test_packed_layers_are_for_inference(tiny, ids):
    model = bitnet.pack(convert(tiny(), ternary=True).train())
    assert not model.training
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    with pytest.raises(ValueError, match="PackedLinear is in training mode"):
        model.train()(input_ids=ids, labels=ids)


def test_what_cannot_be_is_refused(tiny):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=6))
    before = repr(gpt2)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        convert(gpt2, ternary=True)
    assert (repr(gpt2), type(gpt2)) == (before, GPT2LMHeadModel)
    with pytest.raises(ValueError, match="ternary is 'packed'; it must be True or False"):
        convert(tiny(), ternary="packed")
    plain = convert(tiny(), **CONVERSIONS["moh"])
    with pytest.raises(ValueError, match="ternary is 'no'; it must be 'trained'"):
        bitnet.pack(plain)
    model = convert(tiny(), ternary=True)
    with pytest.raises(ValueError, match="no experts that are not ternary already"):
        bitnet.ternarize(model)
    with pytest.raises(ValueError, match=r"the model is ternary, so .* gone; load the original"):
        restore(model)
    with pytest.raises(ValueError, match="ternary is 'packed'; it must be 'trained'"):
        bitnet.pack(bitnet.pack(model))


def test_attention_outside_of_lists_of_layers_is_refused(tiny):
    model = tiny()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is in no nn\.ModuleList"):
        convert(model, ternary=True)


def test_experts_of_transformers_are_refused_but_may_be_replaced():
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.* which cannot be made ternary"):
        convert(transformers.MixtralForCausalLM(config), ternary=True)
    model = convert(transformers.MixtralForCausalLM(config), ternary=True, mlp=MIXTURE)
    assert {type(m) for m in linears(model.model).values()} == {BitLinear}
