"""MoH-DiT and DiT as released: the constructor's arguments, the names of the weights."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from headwise.models import DiT, DiTConfig

_ATTENTION = {
    "wg.": "router.routed.",
    "wg_0.": "router.stage.",
    "wg_1.": "router.shared.",
    "proj.": "o_proj.",
}
_DIT = {
    "x_embedder.proj.": "patch_embedding.",
    "t_embedder.mlp.0.": "time_embedding.up.",
    "t_embedder.mlp.2.": "time_embedding.down.",
    "y_embedder.embedding_table.": "label_embedding.",
    "pos_embed": "positions",
    "final_layer.adaLN_modulation.1.": "final_layer.modulation.",
}
_DIT_BLOCK = {"mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2.", "adaLN_modulation.1.": "modulation."}


def build(
    *,
    input_size: int = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    hidden_size: int = 1152,
    depth: int = 28,
    num_heads: int | list[int] = 16,
    mlp_ratio: float = 4.0,
    class_dropout_prob: float = 0.1,
    num_classes: int = 1000,
    learn_sigma: bool = True,
    moh: bool = False,
    shared_head: Sequence[int] = (),
    routed_head: Sequence[int] = (),
    head_dim: int | None = None,
) -> nn.Module:
    """From the arguments of the released constructor."""
    active = [shared + kept for shared, kept in zip(shared_head, routed_head, strict=False)]
    config = DiTConfig(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_heads=num_heads,
        # The released code ignores it where all layers have as many heads.
        head_dim=None if isinstance(num_heads, int) else head_dim,
        mlp_ratio=mlp_ratio,
        class_dropout=class_dropout_prob,
        num_labels=num_classes,
        learn_sigma=learn_sigma,
        shared_heads=list(shared_head) if moh else None,
        active_heads=active if moh else None,
    )
    return DiT(config)


def _begins_otherwise(name: str, beginnings: Mapping[str, str]) -> str:
    old = next((old for old in beginnings if name.startswith(old)), "")
    return beginnings.get(old, "") + name.removeprefix(old)


def rename_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An attention's tensors by our names; what is no part of the released code keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("qkv.weight", "qkv.bias"):
            parts = zip("qkv", tensor.tensor_split(3), strict=True)
            renamed |= {f"{p}_proj.{name.removeprefix('qkv.')}": part for p, part in parts}
        else:
            renamed[_begins_otherwise(name, _ATTENTION)] = tensor
    return renamed


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by our names; what is no part of the released code keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.match(r"blocks\.\d+\.", name)
        rest = name if block is None else name.removeprefix(block[0])
        if block is None:
            # A convolution that cuts patches is a linear layer on them.
            patches = name == "x_embedder.proj.weight"
            renamed[_begins_otherwise(name, _DIT)] = tensor.flatten(1) if patches else tensor
        elif rest.startswith("attn."):
            attention = rename_attention({rest.removeprefix("attn."): tensor})
            renamed |= {f"{block[0]}attention.{new}": part for new, part in attention.items()}
        else:
            renamed[block[0] + _begins_otherwise(rest, _DIT_BLOCK)] = tensor
    return renamed
