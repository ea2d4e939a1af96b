"""MoH-ViT and TransNeXt as released: the constructor's arguments, the names of the weights."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from headwise.models import TransNeXtConfig, TransNeXtForImageClassification

_OF_STAGE = {
    r"patch_embed(\d+)\.proj": "patches",
    r"patch_embed(\d+)\.norm": "patch_norm",
    r"norm(\d+)": "norm",
}
_OF_BLOCK = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.dwconv.dwconv": "mlp.conv",
    "mlp.fc2": "mlp.down_proj",
    "attn.q": "attention.q_proj",
    "attn.kv": "attention.kv_proj",
    "attn.proj": "attention.o_proj",
    "attn.sr": "attention.pool_proj",
    "attn.norm": "attention.pool_norm",
    "attn.cpb_fc1": "attention.position_bias.up",
    "attn.cpb_fc2": "attention.position_bias.down",
    "attn.wg": "attention.router.routed",
    "attn.wg_0": "attention.router.stage",
    "attn.wg_1": "attention.router.shared",
    "attn.temperature": "attention.temperature",
    "attn.query_embedding": "attention.query_embedding",
    "attn.relative_pos_bias_local": "attention.local_bias",
    "attn.learnable_tokens": "attention.learned_tokens",
    "attn.learnable_bias": "attention.learned_bias",
}


def build(
    *,
    patch_size: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    img_size: int = 224,
    pretrain_size: int | None = None,
    window_size: Sequence[int | None] = (3, 3, 3, None),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    shared_head: Sequence[int] | None = None,
    routed_head: Sequence[int] | None = None,
) -> nn.Module:
    """From the arguments of the released constructor."""
    # Global attention has no window.
    windows = {w for w, ratio in zip(window_size, sr_ratios, strict=False) if ratio > 1}
    if len(windows) > 1:
        raise ValueError(f"window_size is {list(window_size)}; all windows must be of one size")
    active = routed_head
    if shared_head is not None and routed_head is not None:
        active = [shared + kept for shared, kept in zip(shared_head, routed_head, strict=False)]
    config = TransNeXtConfig(
        image_size=img_size,
        pretrain_size=pretrain_size,
        patch_size=patch_size,
        num_channels=in_chans,
        hidden_sizes=tuple(embed_dims),
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        mlp_ratios=tuple(mlp_ratios),
        sr_ratios=tuple(sr_ratios),
        window_size=windows.pop() if windows else 3,
        hidden_dropout=drop_rate,
        drop_path_rate=drop_path_rate,
        shared_heads=shared_head,
        active_heads=active,
        num_labels=num_classes,
    )
    return TransNeXtForImageClassification(config)


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names; what is no part of the released code keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            place, suffix = name, ""
        if block := re.fullmatch(r"block(\d+)\.(\d+)\.(.+)", place):
            prefix = f"backbone.stages.{int(block[1]) - 1}.blocks.{block[2]}."
            renamed |= {
                _joined(prefix + part, suffix): values
                for part, values in _of_block(block[3], tensor).items()
            }
        else:
            renamed[_joined(_outside_blocks(place), suffix)] = tensor
    return renamed


def _of_block(place: str, tensor: Tensor) -> dict[str, Tensor]:
    if place == "attn.qkv":
        dim = tensor.shape[0] // 3
        return {"attention.q_proj": tensor[:dim], "attention.kv_proj": tensor[dim:]}
    if place in ("attn.query_embedding", "attn.learnable_bias"):
        tensor = tensor.squeeze(1)
    elif place == "attn.temperature":
        tensor = tensor.flatten()
    return {_OF_BLOCK.get(place, place): tensor}


def _outside_blocks(place: str) -> str:
    if place == "head":
        return "classifier"
    for pattern, ours in _OF_STAGE.items():
        if stage := re.fullmatch(pattern, place):
            return f"backbone.stages.{int(stage[1]) - 1}.{ours}"
    return place


def _joined(place: str, suffix: str) -> str:
    return f"{place}.{suffix}" if suffix else place
