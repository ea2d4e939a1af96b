"""transformers' own tests of each family, on converted models: `make peers`.

A class of tests says how its model is made and what all models must do: save, load, generate,
train, resize. Here the same tests run on models of the same sizes that are converted. RUN_SLOW=1
exports them, too.
"""

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from typing import Any
from unittest import mock

import pytest
from transformers import PreTrainedModel

import headwise
from headwise import MoEConfig, MoHConfig
from headwise.hf.auto import routed_classes

if importlib.util.find_spec("tests.test_modeling_common") is None:
    pytest.skip("needs the tests of transformers: make peers", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")

HEADS = MoHConfig(shared=1, active=2, router="two_stage", router_std=0.02)
# Rows of a multiple of 16 bytes, which torch's grouped_mm needs.
EXPERTS = MoEConfig(num_experts=5, top_k=2, expert_dim=16)
# What is tested, by transformers' name of the family and of its class of tests.
FAMILIES = {
    "Llama": ("llama", {"attention": HEADS}),
    "Qwen2": ("qwen2", {"attention": HEADS, "mlp": EXPERTS}),
    "Qwen3": ("qwen3", {"attention": HEADS}),
    "Mistral": ("mistral", {"mlp": EXPERTS}),
    "Gemma": ("gemma", {"attention": HEADS}),
    "GPT2": ("gpt2", {"attention": HEADS}),
    "Bert": ("bert", {"attention": HEADS}),
    "ViT": ("vit", {"attention": HEADS}),
}
# Which tests models of these sizes have heads enough for.
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# Tests that need models of the hub, or processes that know each other.
APART = ("PipelineTesterMixin", "TensorParallelTesterMixin", "FSDPTesterMixin")

# What a model with routed heads refuses by design: the message with which these tests end.
OF_HEADS = {
    # Another attention would compute every head.
    "a model with routed heads takes 'headwise' only": (
        "test_attention_outputs",
        "test_can_set_attention_dynamically",
        "test_eager_matches_sdpa_inference_*",
        "test_gpt2_sdpa_matches_eager_with_scaling_configs",
        "test_sliding_window_mask",
    ),
    "False is not true": ("test_sdpa_can_dispatch_non_composite_models",),
    # Heads that are off have no attention weights.
    "output_attentions is True; routed heads do not keep attention weights": (
        "test_capture_outputs_decorator",
        "test_model_outputs_equivalence",
    ),
    "output_attentions` attribute is not": ("test_retain_grad_hidden_states_attentions",),
    "it has cross attention": (
        "test_cross_attention_respects_encoder_padding_mask",
        "test_decoder_model_past_with_large_inputs",
        "test_for_causal_lm_decoder",
        "test_model_as_decoder*",
    ),
}
# What every converted model refuses by design, or is by design.
OF_ANY = {
    # No gradient would reach a router.
    "use use_reentrant=False": ("test_training_gradient_checkpointing_use_reentrant_true",),
    # What does not fit is an error, and so is a missing weight; what cannot be read is named.
    "the model: mismatched_keys": ("test_can_load_ignoring_mismatched_shapes",),
    " is 2, and there are 1 weights": ("test_model_weights_reload_no_missing_tied_weights",),
    "You are using `from_pretrained` with a meta device": (
        "test_cannot_load_with_meta_device_context_manager",
    ),
    "no Auto class of transformers loads it": ("test_gpt2_double_lm_head_model",),
    # A class inherits it through the original, and names what some of its models have.
    "False is not true": ("test_inherits_generation_mixin", "test_keep_in_fp32_modules_exist"),
}
OF_TEXT = {"the model: mismatched_keys": ("test_load_with_mismatched_shapes",)}
# Classes say that their models may have experts.
WITHOUT_EXPERTS = {
    "Expected 'mock' to have been called": ("test_eager_matches_batched_and_grouped_inference_*",)
}
# How a test ends on transformers' own model, too.
OF_ORIGINALS = {
    "MistralModelTest": {
        "only supported for models with only full attention": ("test_generate_with_quant_cache",)
    }
}
# Tests that ask for another attention, of which they want nothing else. They get ours.
WITH_OURS = ("test_eager_padding_matches_*", "test_sdpa_padding_matches_*")
# Likewise, and they look at its weights by the way.
WITHOUT_WEIGHTS = (
    "test_assisted_decoding_*",
    "test_*_dict_output*",
    "test_generate_compilation_all_outputs",
)


def on_converted(test_class: Any, to: Mapping[str, Any]) -> Any:
    """A class of the same tests, whose models are converted."""
    module = importlib.import_module(test_class.__module__)

    class OnConverted(test_class):
        def setUp(self) -> None:
            super().setUp()
            places = ExitStack()
            self.addCleanup(places.close)
            tester = self.model_tester
            for name, value in SIZES.items():
                if hasattr(tester, name):
                    setattr(tester, name, value)
            for place in (tester, module):
                for name, kind in model_classes_in(place):
                    places.enter_context(mock.patch.object(place, name, routed(kind)))
            places.enter_context(mock.patch.object(common, "get_values", get_values))
            get_config = converting(tester.get_config, self.all_model_classes[0], to)
            places.enter_context(mock.patch.object(tester, "get_config", get_config))
            found = map(routed, self.all_model_classes)
            self.all_model_classes = tuple(kind for kind in found if isinstance(kind, type))
            if "attention" in to and fits(self._testMethodName, WITH_OURS + WITHOUT_WEIGHTS):
                self.has_attentions = fits(self._testMethodName, WITH_OURS)
                config_class = self.all_model_classes[0].config_class
                ours = property(lambda _: "headwise", lambda _, name: None)
                places.enter_context(mock.patch.object(config_class, "_attn_implementation", ours))

        def _skip_if_not_exportable(self) -> None:
            """It would look for loops over experts in the file where our classes are made."""

        @contextmanager
        def subTest(self, *_: Any, **__: Any) -> Iterator[None]:  # noqa: N802
            """What a part raises, the test raises."""
            yield

    apart = (kind for kind in test_class.__mro__ if kind.__name__ in APART)
    for name in [name for kind in apart for name in vars(kind) if name.startswith("test_")]:
        setattr(OnConverted, name, None)
    by_design = [OF_ANY, OF_ORIGINALS.get(test_class.__name__, {})]
    by_design += [OF_HEADS] if "attention" in to else []
    by_design += [OF_TEXT] if issubclass(test_class, common.GenerationTesterMixin) else []
    by_design += [] if "mlp" in to else [WITHOUT_EXPERTS]
    for message, patterns in (item for part in by_design for item in part.items()):
        for name in filter(lambda name: fits(name, patterns), dir(OnConverted)):
            setattr(OnConverted, name, ending_with(message, getattr(OnConverted, name)))
    return OnConverted


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def ending_with(message: str, test: Any) -> Any:
    @functools.wraps(test)
    def ends(self: Any) -> None:
        with pytest.raises((ValueError, AssertionError, RuntimeError), match=re.escape(message)):
            test(self)

    return ends


def routed(model_class: Any) -> Any:
    """The class of a converted model; where there is none, what says so when it is called."""
    try:
        return routed_classes(model_class)[0]
    except ValueError:
        return lambda *_, **__: routed_classes(model_class)


def model_classes_in(place: Any) -> list[tuple[str, Any]]:
    def is_of_family(found: Any) -> bool:
        return (
            isinstance(found, type)
            and issubclass(found, PreTrainedModel)
            and found.config_class is not None
        )

    return inspect.getmembers(place, is_of_family)


def converting(get_config: Callable[..., Any], model_class: Any, to: Mapping[str, Any]) -> Any:
    """That function of a tester, but of a converted model's config."""

    @functools.wraps(get_config)
    def get(*args: Any, **kwargs: Any) -> Any:
        original = get_config(*args, **kwargs)
        given = original._attn_implementation
        config = headwise.convert(model_class(original), **to).config
        if "attention" not in to:  # as it was before there was a model of it
            config._attn_implementation = given
        return config

    return get


def get_values(names: Any) -> list[Any]:
    """transformers' own; by the names in it, its tests tell which labels a class takes."""
    found = auto.get_values(names)
    return [*found, *(f"Routed{name}" for name in found if isinstance(name, str))]


auto = importlib.import_module("transformers.models.auto")
common = importlib.import_module("tests.test_modeling_common")
for family, (name, to) in FAMILIES.items():
    of_family = importlib.import_module(f"tests.models.{name}.test_modeling_{name}")
    made = on_converted(getattr(of_family, f"{family}ModelTest"), to)
    made.__name__ = made.__qualname__ = f"Test{family}"
    made.__module__ = __name__
    globals()[made.__name__] = made
del made, of_family
