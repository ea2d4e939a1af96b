"""Loading a model from a path, or an original that is not converted yet: whole, or an error."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import repo_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from headwise.hf.adapters import MODEL_TYPE
from headwise.hf.auto import class_named
from headwise.hf.reading import load_strictly, reading_model
from headwise.results.files import as_object

# The options of `from_pretrained` that say where on the hub a model is, and who asks.
_OF_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def check_holds_model(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if no model was saved there, with those of the run that may be there.

    Text that may be a name on the hub passes.
    """
    directory = Path(path)
    if not directory.exists():
        if isinstance(path, str) and not path.startswith((".", "/", "~")):
            return
        raise ValueError(f"{directory} holds no model: there is no such directory")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; give the directory of a model")
    if not (directory / "config.json").is_file():
        inside = sorted(str(p.parent) for p in directory.glob("models/*/config.json"))
        hint = f"; the run in it has {', '.join(inside)}" if inside else ""
        raise ValueError(f"{directory} holds no model (no config.json){hint}")


def check_place(path: str, **options: Any) -> None:
    """Whether there is such a directory, or a model of that name on the hub or kept from there.

    transformers finds out too, but without a network only after most of a minute of retries.

    Args:
        path: The directory or the name.
        options: Those of `_OF_HUB` that `from_pretrained` gets.

    Raises:
        ValueError: If there is none, or the hub does not answer.
    """
    if Path(path).is_dir() or options.get("local_files_only"):
        return
    file = os.path.join(options.get("subfolder") or "", "config.json")
    of_cache = {name: options.get(name) for name in ("cache_dir", "revision")}
    try:
        kept = isinstance(try_to_load_from_cache(path, file, **of_cache), str)
        found = kept or repo_exists(path, token=options.get("token"))
    except HFValidationError as error:
        raise ValueError(
            "there is no such directory, and no model on the Hugging Face hub can have this name"
        ) from error
    except Exception as error:  # a network fails in as many ways as there are kinds of errors
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"there is no such directory, and the Hugging Face hub cannot be asked ({why})"
        ) from error
    if not found:
        raise ValueError(
            "there is no such directory, and no such model on the Hugging Face hub that you may see"
        )


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """The model in a directory, of the class that its config names, in eval mode.

    Args:
        path: A directory with what `headwise.convert` made (of transformers or of diffusers), a
            model of `headwise.models`, or a model of transformers as it is; or the name of one on
            the Hugging Face hub.
        options: Of `from_pretrained`, such as dtype, device_map or revision.

    Returns:
        The model, an instance of the class that was saved.

    Raises:
        ValueError: If there is no model, its class is not known, or a weight is missing, misshapen
            or not finite; of a converted model and of a DiT also if one is left over.
    """
    of_hub = {name: options[name] for name in _OF_HUB if name in options}
    with _opened(path, "cannot be loaded", **of_hub) as name:
        if (kind := _diffusers_class(name, **of_hub)) is None:
            return _load(config_in(name, **of_hub), name, **options).eval()
        if not kind.startswith("Routed"):
            raise ValueError(_of_diffusers(kind))
        from headwise.hf.of_diffusers import class_of

        return class_of(kind).from_pretrained(name, **options).eval()


def load_original(path: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of the class that its config names. Weights that the class lacks are left out.

    Args:
        path: A directory as transformers saves it, or a name on the Hugging Face hub.
    """
    with _opened(path, "cannot be converted") as name:
        if (kind := _diffusers_class(name)) is not None:
            raise ValueError(f"{_of_diffusers(kind)} and give the model")
        config = config_in(name)
        if config.model_type == MODEL_TYPE:
            raise ValueError("it is converted already; give the original")
        return _load(config, name)


@contextmanager
def _opened(path: str | os.PathLike[str], otherwise: str, **of_hub: Any) -> Iterator[str]:
    """The name of a place that has a model; inside, errors are those of reading it."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"path is a {type(path).__name__}; it must be a directory, or a name on the hub"
        )
    inside = Path(path) / (of_hub.get("subfolder") or "")
    check_holds_model(inside if inside.is_dir() else path)
    name = os.fspath(path)
    with reading_model(name, otherwise):
        check_place(name, **of_hub)
        yield name


def config_in(name: str, **of_hub: Any) -> Any:
    """The config of a model, of a class that transformers has or an import registered.

    Raises:
        ValueError: For a type of models that is neither. transformers asks whether to run what lies
            beside such a model.
    """
    model_type = _fields_of(name, **of_hub).get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no models of type {model_type!r}")
    return AutoConfig.from_pretrained(name, **of_hub)


def _load(config: Any, name: str, **options: Any) -> Any:
    (architecture,) = config.architectures or [""]
    model_class = class_named(architecture, type(config))
    if model_class is None:
        raise ValueError(f"transformers has no class {architecture or 'for it'}")
    load = model_class.from_pretrained
    model, _ = load_strictly(load, name, surplus_allowed=True, **options)
    return model


def _diffusers_class(name: str, **of_hub: Any) -> str | None:
    """Of a model of diffusers, of which transformers only says that it does not know it."""
    return _fields_of(name, **of_hub).get("_class_name")


def _fields_of(name: str, **of_hub: Any) -> dict[str, Any]:
    file = cached_file(name, "config.json", **of_hub)
    return as_object(json.loads(Path(file).read_text())) if file else {}


def _of_diffusers(kind: str) -> str:
    return f"it is a {kind} of diffusers; load it with that class"
