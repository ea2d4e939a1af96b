"""load_released against the goldens of the released code, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headwise import MHMoE, MoHAttention, balance_loss, load_released, record_routing
from headwise.ops import load_and_probability

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
ATTENTIONS = ("a", "b", "shared_only", "routed_only")
MIXTURES = ("h2", "h3_raw", "h1_shared")


def golden(name, dtype):
    """Parameters, the other tensors and the metadata of a golden, floats in that dtype."""
    path = GOLDENS / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    parameters = {k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")}
    return parameters, tensors, metadata


def attention_config(metadata):
    fields = ("dim", "num_heads", "shared_heads", "head_dim", "routed_active")
    config = {field: json.loads(metadata[field].replace("None", "null")) for field in fields}
    return config | {"active_heads": config["shared_heads"] + config.pop("routed_active")}


def released_gradients(layer):
    """Gradients under the released code's names."""
    grads = {name: p.grad for name, p in layer.named_parameters()}
    names = {
        "router.routed": "wg",
        "router.stage": "wg_0",
        "router.shared": "wg_1",
        "o_proj": "proj",
    }
    result = {
        f"{new}.{suffix}": grads[f"{name}.{suffix}"]
        for name, new in names.items()
        for suffix in ("weight", "bias")
        if f"{name}.{suffix}" in grads
    }
    for suffix in ("weight", "bias"):
        result[f"qkv.{suffix}"] = torch.cat([grads[f"{p}_proj.{suffix}"] for p in "qkv"])
    return result


def assert_near(got, want):
    """Within the tolerance of the dtype, relative to the largest element."""
    assert got.shape == want.shape
    assert_close(got, want, rtol=0, atol=TOLERANCE[want.dtype] * want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_the_released_code(name, dtype):
    parameters, tensors, metadata = golden(f"moh_attention_{name}", dtype)
    layer = load_released("moh_attention", parameters, config=attention_config(metadata))
    assert isinstance(layer, MoHAttention)
    assert not layer.training
    x = tensors["x"].requires_grad_()
    y, routing = layer(x)
    assert y.dtype == dtype
    assert_near(y, tensors["y"])
    assert balance_loss(routing).item() == pytest.approx(
        tensors["aux"].item(), rel=TOLERANCE[dtype]
    )
    y.square().sum().backward()
    assert_near(x.grad, tensors["grad_x"])
    gradients = released_gradients(layer)
    assert {f"grad.{key}" for key in gradients} == {k for k in tensors if k.startswith("grad.")}
    for key, gradient in gradients.items():
        assert_near(gradient, tensors[f"grad.{key}"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_equals_the_formulas(name, dtype):
    parameters, tensors, metadata = golden(f"mh_moe_{name}", dtype)
    layer = load_released("mh_moe", parameters, config=json.loads(metadata["config"]))
    assert isinstance(layer, MHMoE)
    assert not layer.training
    y, routing = layer(tensors["x"])
    assert_near(y, tensors["y"])
    chosen = routing.indices.flatten(end_dim=-2).sort(-1).values
    assert torch.equal(chosen, tensors["indices"].sort(-1).values)
    assert balance_loss(routing).item() == pytest.approx(
        tensors["aux"].item(), rel=TOLERANCE[dtype]
    )
    share, _ = load_and_probability(routing)
    assert_near(share, tensors["load"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_llama_equals_the_released_code(cached, dtype, tmp_path):
    parameters, tensors, metadata = golden("moh_llama_small", dtype)
    model = load_released("moh_llama", parameters, config=json.loads(metadata["config"]))
    ids = tensors["input_ids"]
    with torch.no_grad(), record_routing(model) as routings:
        if cached:
            logits, masks, cache = [], [], None
            for piece in ids.split([17, 1, 3, 1, ids.shape[1] - 22], dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
                masks.append([r.weights != 0 for r in routings.values()])
            logits = torch.cat(logits, dim=1)
            masks = [torch.cat(layer, dim=1) for layer in zip(*masks, strict=True)]
        else:
            logits = model(ids).logits
            masks = [r.weights != 0 for r in routings.values()]
    assert_near(logits, tensors["logits"])
    for layer, mask in enumerate(masks):
        assert torch.equal(mask, tensors[f"head_mask.{layer}"])
    # Saved again it is an ordinary model of ours.
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_near(again(ids).logits, model(ids).logits)


LLAMA = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 7,
    "num_hidden_layers": 1, "vocab_size": 11, "rope_theta": 500000.0,
}  # fmt: skip


def test_a_directory_as_transformers_saves_it(tmp_path):
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA))
    plain.save_pretrained(tmp_path)
    model = load_released("moh_llama", tmp_path)
    want = load_released("moh_llama", plain.state_dict(), config=LLAMA)
    ids = torch.randint(11, (2, 5))
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert {layer.self_attn.router.budget.active_heads for layer in model.model.layers} == {3}
    with pytest.raises(ValueError, match=r"config is .* it must be None"):
        load_released("moh_llama", tmp_path, config=LLAMA)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"^the weights in .*missing_keys"):
        load_released("moh_llama", tmp_path)


def test_a_llama_that_does_not_fit_is_refused():
    tensors = LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict()
    with pytest.raises(ValueError, match="unknown field of config 'shared_head'"):
        load_released("moh_llama", tensors, config=LLAMA | {"shared_head": 3})
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"(?s)moh_llama: .*model\.norm\.weight"):
        load_released("moh_llama", tensors, config=LLAMA)


ATTENTION = {"dim": 12, "num_heads": 4, "shared_heads": 2, "active_heads": 3}
MIXTURE = {"dim": 12, "num_heads": 3, "num_experts": 5, "top_k": 2, "expert_dim": 7}


def attention_tensors(dtype=torch.float32):
    shapes = {
        "qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,),
        "wg.weight": (2, 12), "wg_0.weight": (2, 12), "wg_1.weight": (2, 12),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def mixture_tensors(dtype=torch.float32):
    shapes = {
        "head_proj.weight": (12, 12), "merge_proj.weight": (12, 12), "router.weight": (5, 4),
        "experts.gate_proj": (5, 7, 4), "experts.up_proj": (5, 7, 4),
        "experts.down_proj": (5, 4, 7),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


KINDS = {"moh_attention": (attention_tensors, ATTENTION), "mh_moe": (mixture_tensors, MIXTURE)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_path_gives_what_its_tensors_give(kind, dtype, tmp_path):
    make, config = KINDS[kind]
    tensors = make(dtype)
    save_file(tensors, tmp_path / "released.safetensors")
    x = torch.randn(2, 5, 12, dtype=dtype)
    want = load_released(kind, tensors, config=config)(x)[0]
    for path in (tmp_path / "released.safetensors", str(tmp_path / "released.safetensors")):
        layer = load_released(kind, path, config=config)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert torch.equal(layer(x)[0], want)


def test_the_source_is_not_changed():
    for kind, (make, config) in KINDS.items():
        tensors = make()
        names = set(tensors)
        load_released(kind, tensors, config=config)
        assert set(tensors) == names


def test_attention_with_a_bias_on_one_side_only_is_refused():
    tensors = attention_tensors()
    del tensors["qkv.bias"]
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        load_released("moh_attention", tensors, config=ATTENTION)


def test_unknown_kind_and_missing_config():
    with pytest.raises(ValueError, match=r"kind is 'moh_bert'.*'moh_attention'"):
        load_released("moh_bert", {}, config={})
    with pytest.raises(ValueError, match="config is None"):
        load_released("mh_moe", mixture_tensors())
    with pytest.raises(
        ValueError, match="preset is 'dit-s'; 'mh_moe' has no presets, so give conf"
    ):
        load_released("mh_moe", mixture_tensors(), preset="dit-s")


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_tensor_is_an_error(kind):
    make, config = KINDS[kind]
    for name in make():
        tensors = make()
        del tensors[name]
        with pytest.raises(ValueError, match=f"{kind}: "):
            load_released(kind, tensors, config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_left_over_or_misshapen_are_errors(kind):
    make, config = KINDS[kind]
    with pytest.raises(ValueError, match=f"(?s){kind}.*surplus"):
        load_released(kind, make() | {"surplus": torch.zeros(3)}, config=config)
    tensors = make()
    name = next(iter(tensors))
    with pytest.raises(ValueError, match=f"(?s){kind}.*size mismatch"):
        load_released(kind, tensors | {name: tensors[name][:-3]}, config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_configs_that_do_not_fit_are_errors(kind):
    make, config = KINDS[kind]
    with pytest.raises(
        ValueError, match="unknown field of config 'num_head'; did you mean 'num_heads'"
    ):
        load_released(kind, make(), config=config | {"num_head": 2})
    with pytest.raises(ValueError, match=r"config does not fit.*num_heads"):
        load_released(kind, make(), config={k: v for k, v in config.items() if k != "num_heads"})
    with pytest.raises(ValueError, match="size mismatch"):
        load_released(kind, make(), config=config | {"dim": 24})
