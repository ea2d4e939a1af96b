"""vLLM and SGLang, without them: their attention functions, as their backends register them.

A real vLLM runs in tests/test_vllm.py, where one is installed.
"""

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conversions import ALL_ON, GROUPS, MH_MOE, QUERY_NORM, TWO_STAGE
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise import MoHConfig, convert
from headwise.hf.conversion import Conversion
from headwise.hf.engines import ENGINES, attention_for, register_in_vllm

CONVERSIONS = {
    "two_stage": {"attention": TWO_STAGE},
    "query_norm": {"attention": QUERY_NORM},
    "groups": {"attention": GROUPS},
    "one layer": {"attention": TWO_STAGE, "layers": [1]},
    "all on": {"attention": ALL_ON},
    "both": {"attention": TWO_STAGE, "mlp": MH_MOE},
}


class Store:
    """Keys and values of one layer and all requests, as an engine's own layer has them."""

    def __init__(self):
        self.kept = {}

    def forward(self, query, key, value, scale, lengths):
        """[T, H, C] → [T, H · C]; `lengths` has how many of the tokens each request brings."""
        pieces = (x.split(list(lengths.values())) for x in (query, key, value))
        return torch.cat([self.attend(*one, scale) for one in zip(lengths, *pieces, strict=True)])

    def attend(self, request, q, k, v, scale):
        before = self.kept.get(request, (k[:0], v[:0]))
        k, v = self.kept[request] = [torch.cat(pair) for pair in zip(before, (k, v), strict=True)]
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        heads = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        return heads.transpose(0, 1).flatten(1)


def in_tokens(*heads):
    """[1, H, T, C] → [T, H, C] each."""
    return [x[0].transpose(0, 1) for x in heads]


def vllm_attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """vLLM's layer hangs at the attention, and knows the requests by itself."""
    assert attention_mask is None
    y = module.attn.forward(*in_tokens(query, key, value), scaling, module.lengths)
    return y, None


def sglang_flash_attention_forward(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None,
    forward_batch=None, **kwargs,
):  # fmt: skip
    """SGLang's comes with the keyword arguments of the model, by the index of the layer."""
    assert attention_mask is None
    layer = attention_instances[module.layer_idx]
    return layer.forward(*in_tokens(query, key, value), scaling, forward_batch), None


FUNCTIONS = {"vllm": vllm_attention_forward, "sglang": sglang_flash_attention_forward}


@pytest.fixture(params=FUNCTIONS)
def engine(request):
    ALL_ATTENTION_FUNCTIONS[request.param] = FUNCTIONS[request.param]
    yield request.param
    del ALL_ATTENTION_FUNCTIONS[request.param]


def made_by(engine, model, directory):
    """As the backends make a model: of the config in a directory, then its weights."""
    model.save_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    if engine == "vllm":
        config._attn_implementation = engine
        made = AutoModel.from_config(config).eval()
    else:
        made = AutoModel.from_config(config, attn_implementation=engine).eval()
    made.load_state_dict(model.model.state_dict())
    return made


def step(engine, model, stores, tokens, positions):
    """The hidden states of tokens of requests, {request: ids}, all in a row."""
    lengths = {request: len(ids) for request, ids in tokens.items()}
    given = {}
    if engine == "sglang":
        given = {"attention_instances": stores, "forward_batch": lengths}
    for index, layer in enumerate(model.layers):
        layer.self_attn.attn, layer.self_attn.lengths = stores[index], lengths
    with torch.no_grad():
        y = model(
            input_ids=torch.cat(list(tokens.values()))[None],
            position_ids=torch.cat(positions)[None],
            use_cache=False,
            return_dict=False,
            **given,
        )[0][0]
    return dict(zip(tokens, y.split(list(lengths.values())), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_an_engine_computes_what_the_model_does(engine, family, conversion, tiny, tmp_path):
    original = convert(tiny(family), **conversion)
    model = made_by(engine, original, tmp_path)
    assert model.config._attn_implementation == engine
    assert type(model).is_backend_compatible()
    stores = {index: Store() for index in range(3)}
    ids = {name: torch.randint(3, 31, (n,)) for name, n in (("a", 11), ("b", 5), ("c", 7))}
    # A prompt; the next token beside another prompt; a prompt in two pieces.
    schedule = ({"a": (0, 10)}, {"a": (10, 11), "b": (0, 5), "c": (0, 3)}, {"c": (3, 7)})
    found = {name: [] for name in ids}
    for planned in schedule:
        tokens = {name: ids[name][begin:end] for name, (begin, end) in planned.items()}
        positions = [torch.arange(begin, end) for begin, end in planned.values()]
        for name, y in step(engine, model, stores, tokens, positions).items():
            found[name].append(y)
    for name, pieces in found.items():
        with torch.no_grad():
            expected = original.model(ids[name][None]).last_hidden_state[0]
        assert_close(torch.cat(pieces), expected)


def test_heads_that_are_off_are_off_whatever_they_hold(tiny, tmp_path):
    def attend(module, query, key, value, attention_mask, **kwargs):
        return torch.full_like(query[0].transpose(0, 1).flatten(1), torch.nan), None

    ALL_ATTENTION_FUNCTIONS["vllm"] = attend
    try:
        model = made_by("vllm", convert(tiny(), attention=TWO_STAGE), tmp_path)
        attention = model.layers[0].self_attn
        gated, _ = ALL_ATTENTION_FUNCTIONS["vllm"](
            attention, *torch.randn(3, 1, 6, 5, 4), None,
            routing=attention.router(torch.randn(1, 5, 24)),
        )  # fmt: skip
    finally:
        del ALL_ATTENTION_FUNCTIONS["vllm"]
    heads = gated.view(5, 6, 4)
    assert (heads.isnan().all(-1).sum(-1) == 4).all()
    assert ((heads == 0).all(-1).sum(-1) == 2).all()


def test_a_second_model_is_gated_once(engine, tiny, tmp_path):
    for number in "12":
        made_by(engine, convert(tiny(), attention=TWO_STAGE), tmp_path / number)
    assert ALL_ATTENTION_FUNCTIONS[engine].__wrapped__ is FUNCTIONS[engine]


@pytest.mark.parametrize("name", ENGINES)
def test_outside_of_an_engine_its_function_is_refused(name, tiny, tmp_path):
    model = convert(tiny(), attention=TWO_STAGE)
    with pytest.raises(ValueError, match=f"attn_implementation is '{name}', which {name} registe"):
        made_by(name, model, tmp_path)
    with pytest.raises(ValueError, match=f"attn_implementation is '{name}'; a model with routed"):
        model.set_attn_implementation(name)


def test_what_an_engine_would_compute_otherwise_is_refused(engine, tiny, tmp_path):
    model = convert(tiny(), attention=TWO_STAGE, ternary=True)
    with pytest.raises(ValueError, match=f"ternary is 'trained'; {engine} puts its own linear"):
        made_by(engine, model, tmp_path)
    model.config._attn_implementation = engine
    gates = Conversion(attention=MoHConfig(router="output_gate"))
    with pytest.raises(ValueError, match=f"router is 'output_gate'; {engine} computes"):
        attention_for([model.config], gates)


def test_a_part_of_the_heads_is_refused(engine, tiny, tmp_path):
    """As under tensor parallelism."""
    made_by(engine, convert(tiny(), attention=QUERY_NORM), tmp_path)
    model = convert(tiny(num_attention_heads=4), attention=MoHConfig(router="query_norm"))
    attention = model.model.layers[0].self_attn
    attention.attn, attention.lengths = Store(), {"a": 5}
    given = {"attention_instances": [Store()], "forward_batch": {"a": 5}}
    with pytest.raises(ValueError, match="has 2 heads here, and its router routes 4"):
        ALL_ATTENTION_FUNCTIONS[engine](attention, *torch.randn(3, 1, 2, 5, 4), None, **given)


def test_the_plugin_registers_routed_language_models(monkeypatch):
    """vLLM's documented interface: ModelRegistry takes names, and calls it in each process."""
    known = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = type("ModelRegistry", (), {"register_model": known.__setitem__})
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for _ in range(2):
        register_in_vllm()
    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    assert known["RoutedLlamaForCausalLM"] == known["RoutedQwen3ForCausalLM"] == backend


def test_the_package_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["headwise"].partition(":")
    assert getattr(importlib.import_module(module), name) is register_in_vllm
