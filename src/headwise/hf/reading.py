"""Reading what a model's directory holds: strictly, and whatever is wrong names the directory."""

import json
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from headwise.errors import HeadwiseError, UnreadableError, reading, reason


@contextmanager
def reading_model(place: Any, otherwise: str = "cannot be loaded") -> Iterator[None]:
    """While inside, any error is one of reading what is in that place.

    transformers checks little of what it reads: damaged files end in every kind of error.

    Args:
        place: A directory, or a name on the Hugging Face hub.
        otherwise: What to say of it.

    Raises:
        UnreadableError: In the place of any other error, but for a lack of memory; and for a
            config.json with more layers or heads than the weights beside it can have.
    """
    try:
        if isinstance(place, str | os.PathLike):
            _check_counts(Path(place))
        yield
    except (HeadwiseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnreadableError(
            f"{place} {otherwise}: {_blamed(error)}{reason(error, first_line=True)}"
        ) from error


def _blamed(error: Exception) -> str:
    """The file that an error is about, where it does not say so."""
    if isinstance(error, SafetensorError):
        return "*.safetensors: "
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_config = any(
        _describes(frame.get("self")) or _describes(frame.get("cls")) for frame in frames
    )
    return "config.json: " if of_config and "config" not in str(error) else ""


def _describes(found: Any) -> bool:
    """Whether it is a config, or a module, which is made of one when models are loaded."""
    kind = found if isinstance(found, type) else type(found)
    return issubclass(kind, PreTrainedConfig | nn.Module) and not issubclass(kind, PreTrainedModel)


def load_strictly(
    load: Callable[..., Any], path: Any, *args: Any, surplus_allowed: bool = False, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """What a `from_pretrained` of transformers loads, and what it tells of the weights.

    Args:
        load: The `from_pretrained` of a model class.
        path: Of the model.
        surplus_allowed: Leave out weights that the model does not have; but not those of more
            layers or experts, such as layers.2 of a model whose config says that it has two.
        kwargs: Of `from_pretrained`. With `ignore_mismatched_sizes=True` misshapen weights are made
            anew, as those of a classifier for other classes.

    Raises:
        ValueError: If a weight is missing, misshapen, not finite, or unexpected and not allowed, or
            the model cannot be read. Weights of a head that was not saved, because the model had
            another, may be missing, and those of the other unexpected.
    """
    # Otherwise a misshapen weight is transformers' own error, which does not name it.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading_model(path):
        model, info = load(path, *args, **kwargs | told)
    wrong = {kind: sorted(map(_with_shapes, info[kind])) for kind in _KINDS_OF_KEYS if info[kind]}
    if kwargs.get("ignore_mismatched_sizes"):
        wrong.pop("mismatched_keys", None)
    if wrong and isinstance(model, StrictlyLoaded):
        heads = model.names_of_other_heads()
        of_model = f"{getattr(model, 'base_model_prefix', '')}."
        bad = {
            kind: [name for name in names if name.removeprefix(of_model) not in heads]
            for kind, names in wrong.items()
        }
        wrong = {kind: names for kind, names in bad.items() if names}
    if surplus_allowed:
        numberless = {_without_numbers(name) for name in model.state_dict()}
        surplus = wrong.pop("unexpected_keys", [])
        if more := [name for name in surplus if _without_numbers(name) in numberless]:
            wrong["unexpected_keys"] = more
    if wrong:
        kinds = "; ".join(f"{kind}: {first_of(names)}" for kind, names in wrong.items())
        raise UnreadableError(f"the weights in {path} do not fit the model: {kinds}")
    if not_finite := _not_finite(model):
        raise UnreadableError(
            f"the weights in {path} have values that are not finite: {first_of(not_finite)}"
        )
    return model, info


def first_of(names: list[str]) -> str:
    """The first three of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _with_shapes(key: Any) -> str:
    """A weight's name; of a misshapen one, which comes as a tuple, its shape and the model's."""
    return key if isinstance(key, str) else f"{key[0]} {list(key[1])}, not {list(key[2])}"


class StrictlyLoaded:
    """Mixed into a model's class: a missing, unexpected or misshapen weight is an error."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The library's own, whose missing and surplus weights would only be warned of."""
        want_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained  # type: ignore[misc]
        model, info = load_strictly(load, pretrained_model_name_or_path, *args, **kwargs)
        return (model, info) if want_info else model

    def names_of_other_heads(self) -> set[str]:
        """Names of weights in which this class and the class that was saved differ."""
        return set()


def _check_counts(directory: Path) -> None:
    """Refuse more layers or heads than the weights can have: what counts to them would not end."""
    config, weights = directory / "config.json", directory / "model.safetensors"
    if not (config.is_file() and weights.is_file()):  # on the hub, or in several files
        return
    with reading(config, "a JSON object"):
        fields = dict(json.loads(config.read_text()))
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    longest = max((length for shape in shapes for length in shape), default=0)
    for most, names, than in (
        (len(shapes), _LAYERS, f"there are {len(shapes)} weights"),
        (longest, _HEADS, f"no weight is longer than {longest}"),
    ):
        for name in names:
            if isinstance(count := fields.get(name), int) and count > most:
                raise ValueError(f"config.json: {name} is {count}, and {than}")


_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_HEADS = ("num_attention_heads", "num_heads", "n_head")
_SHOWN = 3  # of the names that do not fit
_KINDS_OF_KEYS = ("missing_keys", "mismatched_keys", "unexpected_keys")


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _not_finite(model: nn.Module) -> list[str]:
    """The names of parameters with NaN or infinite values, of those that lie in memory."""
    # Processes that get their shards from the first one hold what was in memory before.
    if is_fsdp_enabled():
        return []
    named = [
        (name, x)
        for name, x in model.named_parameters()
        # Quantised ones have types of their own, and few operators.
        if x.dtype in _DTYPES and not x.is_meta and type(x) is nn.Parameter
    ]
    # One pass without a copy; where large values add up to infinity a second one decides.
    suspects = [(n, x) for n, x in named if not x.detach().sum().isfinite()]
    return [n for n, x in suspects if not x.isfinite().all()]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
