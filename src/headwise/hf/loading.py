"""Loading an original from a path: whole and not converted yet, or an error."""

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from headwise.hf.auto import MODEL_TYPE, class_named, load_strictly


def load_original(path: str | os.PathLike[str]) -> PreTrainedModel:
    """The model of the class that its config names. Weights that the class lacks are left out.

    Args:
        path: A directory as transformers saves it, or a name on the Hugging Face hub.

    Raises:
        ValueError: If there is no model, it is converted already, or a weight is missing or
            misshapen.
    """
    name = os.fspath(path)
    directory = Path(name)
    named_as_one = not isinstance(path, str) or name.startswith((".", "/", "~"))
    if named_as_one and not directory.is_dir():
        raise ValueError(f"path is {name}, where there is no directory")
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise ValueError(f"path is {name}, which holds no model: config.json is missing")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type == MODEL_TYPE:
            raise ValueError("it is converted already; give the original")
        (architecture,) = config.architectures or [""]
        model_class = class_named(architecture, config.model_type)
        if model_class is None:
            raise ValueError(f"transformers has no class {architecture or 'for it'}")
        model, _ = load_strictly(model_class.from_pretrained, name, surplus_allowed=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} holds no model that can be converted: {reason}") from error
    return model
