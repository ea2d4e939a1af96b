"""The pairs of a token and a head that are on, as rows that are computed together.

A *row* is a query token as one key head sees it: row t·R + r is token t under the r-th of the
R = H / Hkv query heads that share the key head. Each (batch entry, key head) has a *list* of the
rows that are on, ascending. A *tile* is a rectangle of neighbouring lists, each filled up to the
longest of them. Lists share a tile only if they keep the same pace: a busy head does not fill up
the lists of all others, and a causal mask cuts all lists of a tile at about the same rank.

Example: one batch entry, T = 4 tokens, H = 2 heads with keys of their own (R = 1), and the gates

    token       0  1  2  3
    head 0      x  x  .  x      list 0, 1, 3
    head 1      .  x  .  x      list 1, 3

Both lists go into one tile of shape (1, 2, 3); the second is filled up with its last row, 3. The
six places of the tile hold

    number      0 1 3 | 1 3 3   the row that stands here
    index       0 2 6 | 3 7 0   its place t·H + h in q[0], [T, H, C] flattened (0: fills up only)

and the eight pairs of q[0] stand at the places 0 6 1 3 6 6 2 4, where 6, one behind the last place,
is for all that is off. So `gather` reads q at `index`, and `scatter` reads results at the places.

A tile in which nearly every row is on, as shared heads are, holds *all* rows of its lists instead
(`whole`): torch's kernel has a causal mask of its own for such a square, which is faster.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.ops.attention.pieces import (
    Piece,
    causal_pieces,
    edge_pieces,
    full_pieces,
    staircase,
)
from headwise.ops.plain_attention import Operands

Numbers = NDArray[np.int64]

# Checkpoints along the rows at which the paces of two lists are compared.
_CHECKPOINTS = 8
# Lists share a tile while they differ by no more rows than this, or this share of their length.
_SLACK_ROWS, _SLACK_SHARE = 64, 0.15
# Matrix products are compiled for each number of rows; multiples of this keep the numbers few.
_ROW_MULTIPLE = 32
# Rows of an edge. torch's CPU kernel works on 64 rows at a time from 192 rows on, on 32 below.
_EDGE_ROWS = 192
# Rows at a time where each has its own mask: memory must not grow with T · S.
_MASKED_ROWS = 256


class Tile(NamedTuple):
    """Lists of rows that are computed together.

    Attributes:
        batch: Batch entries.
        heads: Key heads.
        shape: b batch entries, h key heads, n rows of the longest list.
        start: Where its b·h·n places start among those of all tiles.
        whole: Whether it holds every row of its lists, on or not: row t stands at place t.
    """

    batch: slice
    heads: slice
    shape: tuple[int, int, int]
    start: int
    whole: bool

    def of(self, x: Tensor) -> Tensor:
        """The tile's part [b, h, n, ...] of what stands at the places of all tiles."""
        return x[self.start : self.stop].unflatten(0, self.shape)

    @property
    def stop(self) -> int:
        """Where its places end among those of all tiles."""
        return self.start + math.prod(self.shape)

    def keys(self, x: Tensor) -> Tensor:
        """The tile's part [b, h, S, C] of keys or values [B, S, Hkv, C]."""
        return x[self.batch, :, self.heads].transpose(1, 2)


class Rows:
    """The rows of one call, in tiles, with the way there and back."""

    def __init__(self, x: Operands, *, largest_share: float):
        _, k, _, gate, causal, mask, bias, _ = x
        self.shape, self.causal, self.mask, self.bias = gate.shape, causal, mask, bias
        (batch, queries, heads), (self.keys, kv_heads) = gate.shape, k.shape[1:3]
        self.per_key_head = heads // kv_heads
        # The last query sees the last key.
        self.offset = self.keys - queries
        on_BTH = (gate != 0).cpu().numpy()
        if causal and self.offset < 0:
            # These tokens come before the first key and see none.
            on_BTH[:, : -self.offset] = False
        on_BTGR = on_BTH.reshape(batch, queries, kv_heads, self.per_key_head)
        on_BGTR = on_BTGR.transpose(0, 2, 1, 3)
        # In this order a list is a run of T·R entries, so that each one that is on tells its list
        # b·Hkv + g and its row t·R + r. In the example: lists 0 0 0 1 1, rows 0 1 3 1 3.
        length = queries * self.per_key_head
        lists, rows = np.divmod(np.flatnonzero(on_BGTR), length)
        # Only the square of a plain causal mask has a kernel of its own.
        plain = causal and mask is None and bias is None
        square = plain and queries == self.keys and heads == kv_heads
        counts, self.tiles = cut_into_tiles(
            lists, rows, (batch, kv_heads, length), largest_share if square else math.inf
        )
        self.count = self.tiles[-1].stop if self.tiles else 0
        self._give_places(lists, rows, counts, gate.device)

    def _give_places(
        self, lists: Numbers, rows: Numbers, counts: Numbers, device: torch.device
    ) -> None:
        """Find each row's place in the tiles, and its place in a flattened [B, T, H]."""
        (batch, queries, heads), kv_heads = self.shape, counts.shape[1]
        # The place of each list's first row, [B, Hkv]: 0 and 3 in the example.
        starts: Numbers = np.zeros_like(counts)
        whole = np.zeros(counts.shape, dtype=bool)
        # What fills up a short list comes after all its rows.
        numbers: Numbers = np.full(self.count, queries * self.per_key_head - 1)
        for tile in self.tiles:
            firsts = tile.start + np.arange(math.prod(tile.shape[:2])) * tile.shape[2]
            starts[tile.batch, tile.heads] = firsts.reshape(tile.shape[:2])
            whole[tile.batch, tile.heads] = tile.whole
            if tile.whole:
                numbers[tile.start : tile.stop].reshape(tile.shape)[:] = np.arange(tile.shape[2])
        # The i-th row of a list has the i-th of its places; in a whole tile, row t the t-th.
        # Example: ranks 0 1 2 0 1, places 0 1 2 3 4.
        ranks = np.arange(len(rows)) - (np.cumsum(counts) - counts.reshape(-1))[lists]
        places = starts.reshape(-1)[lists] + np.where(whole.reshape(-1)[lists], rows, ranks)
        numbers[places] = rows
        # Where a list's token 0 stands in a flattened [B, T, H], then where the row stands.
        entries, groups = np.divmod(np.arange(counts.size), kv_heads)
        corners = entries * (queries * heads) + groups * self.per_key_head
        tokens, members = np.divmod(rows, self.per_key_head) if self.per_key_head > 1 else (rows, 0)
        flat = corners[lists] + tokens * heads + members
        index: Numbers = np.zeros(self.count, dtype=np.int64)
        index[places] = flat
        back: Numbers = np.full(batch * queries * heads, self.count)
        back[flat] = places
        self._numbers, self._index, self._places = (
            torch.from_numpy(x).to(device) for x in (numbers, index, back)
        )

    def empty(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a value of each row, shaped like x [B, T, H, ...]; the last is for heads off."""
        room = x.new_empty((self.count + 1, *x.shape[3:]), dtype=dtype)
        room[-1] = 0
        return room

    def gather(self, x: Tensor) -> Tensor:
        """Values [B, T, H, ...] of all rows, tile after tile."""
        return x.reshape(-1, *x.shape[3:]).index_select(0, self._index)

    def gather_once(self, x: Tensor, fill: float = 0) -> Tensor:
        """Like `gather`, but `fill` for rows that only fill up a tile."""
        room = x.new_full((self.count + 1, *x.shape[3:]), fill)
        return room.index_copy_(0, self._places, x.reshape(-1, *x.shape[3:]))[:-1]

    def scatter(self, x: Tensor) -> Tensor:
        """Back to [B, T, H, ...] from `empty`'s room; 0 where a head is off."""
        return x.index_select(0, self._places).unflatten(0, self.shape)

    def pieces(self, tile: Tile) -> list[Piece]:
        """What to compute for a tile."""
        count, plain = tile.shape[2], self.mask is None and self.bias is None
        if not self.causal:
            return full_pieces(count, self.keys, count if plain else _MASKED_ROWS)
        if tile.whole:
            return [Piece(slice(0, count), slice(0, count), "square")]
        limits = self._limits(tile)
        if not plain:
            return edge_pieces(limits, self.keys, _MASKED_ROWS)
        return causal_pieces(limits, self.keys, _EDGE_ROWS)

    def added(self, tile: Tile, piece: Piece, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a piece, [b, h, n, s], if anything."""
        parts = []
        if piece.kind == "edge":
            parts.append(staircase(self._limits(tile)[:, :, piece.rows], piece.keys, dtype))
        if self.bias is not None:
            parts.append(self._of_scores(self.bias, tile, piece).to(dtype))
        if self.mask is not None:
            seen = self._of_scores(self.mask, tile, piece)
            zero = torch.zeros((), dtype=dtype, device=seen.device)
            parts.append(torch.where(seen, zero, float("-inf")))
        if not parts:
            return None
        shape = (
            *tile.shape[:2],
            piece.rows.stop - piece.rows.start,
            piece.keys.stop - piece.keys.start,
        )
        return sum(parts[1:], start=parts[0]).expand(shape)

    def add_to_bias(self, dbias: Tensor, tile: Tile, piece: Piece, dscores: Tensor) -> None:
        """Add the gradient of a piece's scores [b, h, n, s] to that of the bias, in place."""
        index = self._score_index(dbias, tile, piece)
        keys = torch.arange(piece.keys.start, piece.keys.stop, device=dbias.device)
        keys = keys if dbias.shape[3] > 1 else torch.zeros_like(keys)
        dbias.index_put_((*(i.unsqueeze(-1) for i in index), keys), dscores, accumulate=True)

    def _of_scores(self, x: Tensor, tile: Tile, piece: Piece) -> Tensor:
        """The part [b, h, n, s] of x, broadcastable to [B, H, T, S], that a piece needs."""
        x = x[..., piece.keys] if x.shape[3] > 1 else x
        if x.shape[1] == 1 and x.shape[2] == 1:
            return x[tile.batch] if x.shape[0] > 1 else x
        return x[self._score_index(x, tile, piece)]

    def _score_index(self, x: Tensor, tile: Tile, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Batch entry, query head and token of a piece's rows, 0 where x is broadcast."""
        batch, head, token = (
            i if size > 1 else torch.zeros_like(i)
            for i, size in zip(self._coordinates(tile, piece.rows), x.shape, strict=False)
        )
        return batch, head, token

    def _coordinates(self, tile: Tile, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Batch entry, query head and token of rows, each broadcastable to [b, h, n]."""
        numbers = tile.of(self._numbers)[:, :, rows]
        batch, heads = (
            torch.arange(x.start, x.stop, device=numbers.device) for x in (tile.batch, tile.heads)
        )
        query_heads = heads[:, None] * self.per_key_head + numbers % self.per_key_head
        return batch[:, None, None], query_heads, numbers // self.per_key_head

    def _limits(self, tile: Tile) -> Tensor:
        """The last key that each row sees under the causal mask, [b, h, N]."""
        numbers = tile.of(self._numbers)
        tokens = numbers if self.per_key_head == 1 else numbers // self.per_key_head
        return tokens + self.offset


def cut_into_tiles(
    lists: Numbers, rows: Numbers, shape: tuple[int, int, int], whole_from: float
) -> tuple[Numbers, list[Tile]]:
    """Cut the rows that are on into tiles.

    The *pace* of a list is how many of its rows are on up to each of eight checkpoints. Example
    with two checkpoints: rows 0, 1, 3 of four have the pace (2, 3), rows 1, 3 the pace (1, 2).

    Args:
        lists: List b·Hkv + h of each row that is on.
        rows: The row, t·R + r.
        shape: Batch entries, key heads, rows of a list, on or not.
        whole_from: Share of rows that are on from which a tile is computed whole.

    Returns:
        How many rows of each list are on, [B, Hkv], and the tiles, without empty ones.
    """
    batch, heads, length = shape
    # Rows between two checkpoints, then sums: the paces [B, Hkv, checkpoints].
    checkpoints = lists * _CHECKPOINTS + rows * _CHECKPOINTS // max(1, length)
    passed = np.bincount(checkpoints, minlength=batch * heads * _CHECKPOINTS)
    paces = passed.reshape(batch, heads, _CHECKPOINTS).cumsum(2)
    found: list[Tile] = []
    for batch_part, heads_part in _cut(paces, slice(0, batch), slice(0, heads)):
        on = paces[batch_part, heads_part, -1]
        if on.any():
            whole = bool(on.mean() >= whole_from * length)
            longest = -(-int(on.max()) // _ROW_MULTIPLE) * _ROW_MULTIPLE
            rows_of_tile = length if whole else min(length, longest)
            start = found[-1].stop if found else 0
            found.append(Tile(batch_part, heads_part, (*on.shape, rows_of_tile), start, whole))
    return paces[..., -1], found


def _cut(paces: Numbers, batch: slice, heads: slice) -> list[tuple[slice, slice]]:
    """Cut where neighbours differ most, until the lists of every tile keep the same pace."""
    inside = paces[batch, heads]
    spread = np.ptp(inside, axis=(0, 1)).max(initial=0)
    if spread <= max(_SLACK_ROWS, _SLACK_SHARE * inside[..., -1].mean()):
        return [(batch, heads)]
    over_batch, over_heads = _widest_step(inside), _widest_step(inside.swapaxes(0, 1))
    if over_batch[0] > over_heads[0]:
        middle = batch.start + over_batch[1]
        parts = [(slice(batch.start, middle), heads), (slice(middle, batch.stop), heads)]
    else:
        middle = heads.start + over_heads[1]
        parts = [(batch, slice(heads.start, middle)), (batch, slice(middle, heads.stop))]
    return [tile for part in parts for tile in _cut(paces, *part)]


def _widest_step(paces: Numbers) -> tuple[int, int]:
    """The largest difference between neighbours along the first dimension, and where it lies."""
    if len(paces) == 1:
        return -1, 0
    steps = np.abs(np.diff(paces, axis=0)).max(axis=(1, 2))
    return int(steps.max()), int(steps.argmax()) + 1
