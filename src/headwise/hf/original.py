"""The way back: a model with routed heads as the model that it was made from."""

from typing import Any

from transformers import PreTrainedModel

from headwise.hf.auto import Routed


def original_of(model: PreTrainedModel) -> Any:
    """The model without routers, every head on, of the class that it had before `convert`.

    Its weights are copies of the model's: what the conversion left as it was, it gives back; a
    model that was tuned since comes back tuned.

    Raises:
        ValueError: If the model is not converted, its MLPs were replaced by experts, or it is
            ternary.
    """
    if not isinstance(model, Routed):
        raise ValueError(f"{type(model).__name__} is not converted; it is its own original")
    if model.conversion.mlp is not None:
        raise ValueError("the model's MLPs were replaced by experts; its original must be given")
    if model.conversion.ternary != "no":
        raise ValueError("the model is ternary; its original must be given")
    original_class = _class_before(model)
    config = original_class.config_class.from_dict(_plain_fields(model))
    original = original_class._from_config(config, dtype=model.dtype)
    weights = {k: v for k, v in model.state_dict().items() if ".router." not in k}
    original.load_state_dict(weights)
    return original.to(model.device).train(model.training)


def _class_before(model: Routed) -> Any:
    classes = type(model).__mro__
    return classes[classes.index(Routed) + 1]


def _plain_fields(model: Any) -> dict[str, Any]:
    fields = model.config.to_dict()
    base_model_type = fields.pop("base_model_type")
    del fields["headwise"]
    architectures = [_class_before(model).__name__]
    return fields | {"model_type": base_model_type, "architectures": architectures}
