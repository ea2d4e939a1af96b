"""One or a few query tokens against a long cache: only key heads that are on are read.

Reading keys and values is the cost here, not arithmetic. Heads 0, 2, 4 of a cache are a strided
view of it, so torch's kernel computes an evenly spaced run of heads in one call and without a copy.
The kernel gives whole heads to threads; where their number is no multiple of the threads, the keys
are split. Forward only.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.plain_attention import Operands, added_to_scores, attend


def head_attention(x: Operands) -> Tensor:
    return decode_attention(x.q, x.k, x.v, x.gate, _added(x), x.scale)


@torch.library.custom_op("headwise::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, added: Tensor | None, scale: float
) -> Tensor:
    """y [B, T, H, C]; `added` [B|1, Hkv|1, T·R|1, S] is added to the scores."""
    groups = k.shape[2]
    rows = rearrange(q, "b t (g r) c -> b g (t r) c", g=groups)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = torch.zeros_like(rows)
    for b, heads_on in enumerate(_key_heads_on(gate, groups).tolist()):
        for heads in _runs([head for head, is_on in enumerate(heads_on) if is_on]):
            own = slice(b, b + 1)
            part = None if added is None else _part(added, own, heads)
            out[b, heads] = _attend_split(rows[own, heads], k[b, heads], v[b, heads], part, scale)
    y = rearrange(out, "b g (t r) c -> b t (g r) c", t=q.shape[1])
    return y * gate.to(y.dtype).unsqueeze(-1)


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, added: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.headwise.decode_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any, **__: Any) -> int:
    """All query heads of a key head that is on are computed."""
    queries, heads, channels = q.shape[1:]
    keys, groups = k.shape[1:3]
    rows = int(_key_heads_on(gate, groups).sum()) * queries * (heads // groups)
    return 4 * channels * rows * keys


def _key_heads_on(gate: Tensor, groups: int) -> Tensor:
    """Key heads [B, Hkv] with a query head that is on."""
    return (gate != 0).unflatten(2, (groups, -1)).any(3).any(1)


def _attend_split(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Attention of q [1, h, n, C] to keys [h, S, C], with work for every thread: [h, n, C]."""
    heads, keys = k.shape[:2]
    splits = min(math.lcm(heads, torch.get_num_threads()) // heads, keys)
    if splits == 1:
        return attend(q, k[None], v[None], added=added, scale=scale)[0][0]
    length = keys // splits

    def split(x: Tensor) -> Tensor:
        return x[:, : splits * length].unflatten(1, (splits, length)).transpose(0, 1)

    part = None if added is None else split(added[0].transpose(1, 2)).transpose(2, 3)
    out, lse = attend(q.expand(splits, -1, -1, -1), split(k), split(v), added=part, scale=scale)
    if splits * length < keys:
        rest = slice(splits * length, keys)
        part = None if added is None else added[..., rest]
        more = attend(q, k[None, :, rest], v[None, :, rest], added=part, scale=scale)
        out, lse = torch.cat([out, more[0]]), torch.cat([lse, more[1]])
    # The weights of a row that sees no key at all are 0/0.
    weights = lse.softmax(0).nan_to_num(0).unsqueeze(-1)
    return (out * weights).sum(0)


def _runs(heads: list[int]) -> Iterator[slice]:
    """Ascending numbers as evenly spaced slices: 0, 1, 2, 5, 7 gives 0:3:1 and 5:8:2."""
    while heads:
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        length = 1
        for one, next_one in pairwise(heads):
            if next_one - one != step:
                break
            length += 1
        run, heads = heads[:length], heads[length:]
        yield slice(run[0], run[-1] + 1, step)


def _added(x: Operands) -> Tensor | None:
    """What is added to the scores, its query heads folded into rows."""
    added = added_to_scores(x)
    if added is None:
        return None
    queries, heads, keys, groups = *x.q.shape[1:3], *x.k.shape[1:3]
    if added.shape[1] == 1 and added.shape[2] == 1:
        return added.expand(-1, -1, -1, keys)
    added = added.expand(-1, heads, queries, keys)
    return rearrange(added, "b (g r) t s -> b g (t r) s", g=groups)


def _part(added: Tensor, batch: slice, heads: slice) -> Tensor:
    """The part of `added` for one batch entry and some key heads; both axes may be broadcast."""
    added = added[batch] if added.shape[0] > 1 else added
    return added[:, heads] if added.shape[1] > 1 else added
