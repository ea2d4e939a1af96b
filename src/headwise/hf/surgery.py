"""Putting routers and experts into a transformers model: which modules change, and how."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.hf import attention as headwise_attention
from headwise.hf.configs import Conversion
from headwise.nn import MHMoE, QueryNormRouter, TwoStageRouter


def install(model: PreTrainedModel, conversion: Conversion) -> None:
    """Put routers and experts where the conversion says. All are built before one is placed.

    Experts start with the deviation of the MLPs that they replace (`config.initializer_range`).
    """
    layers = _decoder_layers(model)
    config = model.config
    new_routers: dict[int, TwoStageRouter | QueryNormRouter] = {}
    new_mlps: dict[int, RoutedMLP] = {}
    for index, layer in enumerate(layers):
        reference = next(layer.parameters())
        if conversion.attention is not None:
            router = conversion.attention.build_router(
                config.hidden_size,
                config.num_attention_heads,
                getattr(config, "num_key_value_heads", None),
            )
            new_routers[index] = router.to(reference.device, reference.dtype)
        if conversion.mlp is not None and (index + 1) % conversion.every == 0:
            experts = conversion.mlp.build(config.hidden_size)
            experts.reset_experts(std=config.initializer_range)
            new_mlps[index] = RoutedMLP(experts).to(reference.device, reference.dtype)
    if conversion.mlp is not None and not new_mlps:
        raise ValueError(f"every is {conversion.every}, but the model has {len(layers)} layers")
    for index, router in new_routers.items():
        headwise_attention.install_router(layers[index].self_attn, router)
    for index, mlp in new_mlps.items():
        layers[index].mlp = mlp
    if new_routers:
        model.set_attn_implementation(headwise_attention.NAME)


class RoutedMLP(nn.Module):
    """A layer of ours where a transformers MLP stood: same call, the routing is for a recorder."""

    def __init__(self, experts: MHMoE):
        super().__init__()
        self.layer = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, _ = self.layer(hidden_states)
        return y


def _decoder_layers(model: PreTrainedModel) -> list[Any]:
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not all(hasattr(x, "self_attn") and hasattr(x, "mlp") for x in layers):
        raise ValueError(
            f"{type(model).__name__} cannot be converted: its layers must have `self_attn` and "
            "`mlp`, as Llama's do"
        )
    return list(layers)
