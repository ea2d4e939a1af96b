"""The names of released weights, and ours: a table for each part of a model, one reader for all.

A table has beginnings of released names, and what stands there in ours; a # is the same number in
both. Where a table stands beside it, that renames what follows. A name that begins otherwise is no
part of the released code, and stays.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

_ATTENTION = {
    "wg.": "router.routed.",
    "wg_0.": "router.stage.",
    "wg_1.": "router.shared.",
    "proj.": "o_proj.",
}
_DIT_BLOCK = {
    "attn.": ("attention.", _ATTENTION),
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "adaLN_modulation.1.": "modulation.",
}
_DIT = {
    "x_embedder.proj.": "patch_embedding.",
    "t_embedder.mlp.0.": "time_embedding.up.",
    "t_embedder.mlp.2.": "time_embedding.down.",
    "y_embedder.embedding_table.": "label_embedding.",
    "pos_embed": "positions",
    "blocks.#.": ("blocks.#.", _DIT_BLOCK),
    "final_layer.adaLN_modulation.1.": "final_layer.modulation.",
}
_TRANSNEXT_ATTENTION = _ATTENTION | {
    "q.": "q_proj.",
    "kv.": "kv_proj.",
    "sr.": "pool_proj.",
    "norm.": "pool_norm.",
    "cpb_fc1.": "position_bias.up.",
    "cpb_fc2.": "position_bias.down.",
    "relative_pos_bias_local": "local_bias",
    "learnable_tokens": "learned_tokens",
    "learnable_bias": "learned_bias",
}
_TRANSNEXT_BLOCK = {
    "norm1.": "attention_norm.",
    "norm2.": "mlp_norm.",
    "mlp.fc1.": "mlp.up_proj.",
    "mlp.dwconv.dwconv.": "mlp.conv.",
    "mlp.fc2.": "mlp.down_proj.",
    "attn.": ("attention.", _TRANSNEXT_ATTENTION),
}
# Stages are counted from 1 there.
_TRANSNEXT = {
    "patch_embed#.proj.": "backbone.stages.#-1.patches.",
    "patch_embed#.norm.": "backbone.stages.#-1.patch_norm.",
    "block#.#.": ("backbone.stages.#-1.blocks.#.", _TRANSNEXT_BLOCK),
    "norm#.": "backbone.stages.#-1.norm.",
    "head.": "classifier.",
}
# By our names. A convolution that cuts patches is a linear layer on them.
_RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "patch_embedding.weight": lambda x: x.flatten(1),
    "attention.temperature": Tensor.flatten,
    "attention.query_embedding": lambda x: x.squeeze(1),
    "attention.learned_bias": lambda x: x.squeeze(1),
}


def _renamed(name: str, table: Mapping[str, Any]) -> str:
    matches = ((re.match(re.escape(x).replace(r"\#", r"(\d+)"), name), table[x]) for x in table)
    begins, new = next((found for found in matches if found[0]), (None, name))
    if begins is None:
        return name
    ours, inside = new if isinstance(new, tuple) else (new, {})
    numbers = iter(begins.groups())
    ours = re.sub("#(-1)?", lambda less: str(int(next(numbers)) - bool(less[1])), ours)
    return ours + _renamed(name[begins.end() :], inside)


def _read(
    tensors: Mapping[str, Tensor], *, table: Mapping[str, Any], qkv: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors by our names. Of one matrix for q, k and v each name of `qkv` gets a third.

    The last name gets what is left.
    """
    renamed = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, table)
        for end, reshape in _RESHAPED.items():
            tensor = reshape(tensor) if ours.endswith(end) else tensor
        place, is_joint, suffix = ours.rpartition("qkv.")
        if not is_joint:
            renamed[ours] = tensor
            continue
        third = tensor.shape[0] // 3
        parts = tensor.tensor_split([third, 2 * third][: len(qkv) - 1])
        renamed |= {f"{place}{p}_proj.{suffix}": part for p, part in zip(qkv, parts, strict=True)}
    return renamed


def mh_moe(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by our names: gate and up matrix are one, the gate first."""
    renamed = dict(tensors)
    gate, up = renamed.pop("experts.gate_proj"), renamed.pop("experts.up_proj")
    renamed["experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    if "shared.gate_proj.weight" in renamed:
        gate, up, down = (renamed.pop(f"shared.{p}_proj.weight") for p in ("gate", "up", "down"))
        renamed["shared_expert.gate_up_proj"] = torch.cat([gate, up]).unsqueeze(0)
        renamed["shared_expert.down_proj"] = down.unsqueeze(0)
    return renamed


moh_attention = partial(_read, table=_ATTENTION, qkv=("q", "k", "v"))
dit = partial(_read, table=_DIT, qkv=("q", "k", "v"))
transnext = partial(_read, table=_TRANSNEXT, qkv=("q", "kv"))
