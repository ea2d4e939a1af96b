"""The (query, head) pairs that are on, as rows that are computed together.

A *row* is a query token as one key head sees it: row t·R + r is token t under the r-th of the
R = H / Hkv query heads that share the key head. Each (batch, key head) has its own list of rows,
ascending. Lists that keep the same pace share a tile, padded to its longest, so that a skewed
router does not make every head pay for the busiest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.ops.head_attention.pieces import (
    Piece,
    causal_pieces,
    edge_pieces,
    full_pieces,
    staircase,
)

# Checkpoints along the rows at which the paces of two lists are compared.
_CHECKPOINTS = 8
# Lists share a tile while they differ by no more rows than this, or this share of their length.
_SLACK_ROWS, _SLACK_SHARE = 48, 0.125
# A tile with more than this share of its rows on is computed whole: gathering, splitting and merging
# would cost more than the rows that are off.
_WHOLE = 0.9
# Rows of an edge by dtype: fewer waste less on keys beyond a row, more keep the products busy.
_EDGE_ROWS = {torch.float64: 128, torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# Rows at a time where each has its own mask: memory must not grow with T · S.
_MASKED_ROWS = 256


class Tile(NamedTuple):
    """Lists of rows that are computed together.

    Attributes:
        batch: Batch entries.
        heads: Key heads.
        shape: Of its rows: batch entries, key heads, rows of the longest list.
        start: Where its rows start among those of all tiles.
        whole: Whether it holds every row, on or not.
    """

    batch: slice
    heads: slice
    shape: tuple[int, int, int]
    start: int
    whole: bool

    def of(self, x: Tensor) -> Tensor:
        """The tile's part [b, h, N, ...] of the rows of all tiles."""
        return x[self.start : self.stop].unflatten(0, self.shape)

    @property
    def stop(self) -> int:
        """Where its rows end among those of all tiles."""
        return self.start + math.prod(self.shape)

    def keys(self, x: Tensor) -> Tensor:
        """The tile's part [b, h, S, C] of keys or values [B, S, Hkv, C]."""
        return x[self.batch, :, self.heads].transpose(1, 2)


class Rows:
    """The rows of one call, in tiles, with the way there and back."""

    def __init__(
        self, gate: Tensor, k: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None
    ):
        self.shape, self.causal, self.mask, self.bias = gate.shape, causal, mask, bias
        (batch, queries, heads), (self.keys, kv_heads) = gate.shape, k.shape[1:3]
        self.per_key_head = heads // kv_heads
        # The last query sees the last key.
        self.offset = self.keys - queries
        on = (gate != 0).unflatten(2, (kv_heads, self.per_key_head)).permute(0, 2, 1, 3).flatten(2)
        if causal and self.offset < 0:
            on[:, :, : -self.offset * self.per_key_head] = False
        if self.keys == 0:
            on.zero_()
        counts, self.tiles = cut_into_tiles(on)
        self.count = self.tiles[-1].stop if self.tiles else 0
        self._number_rows(on, counts)

    def _number_rows(self, on: Tensor, counts: Tensor) -> None:
        """Find each row's place among the tiles' and its place in a flattened [B, T, H]."""
        (_, queries, heads), device = self.shape, on.device
        lists, rows = on.flatten(0, 1).nonzero().unbind(1)
        base, whole = _starts(self.tiles, counts.shape)
        first = counts.flatten().cumsum(0) - counts.flatten()
        places = torch.arange(len(rows), device=device) + (base - first).to(device)[lists]
        if whole.any():
            places = torch.where(whole.to(device)[lists], base.to(device)[lists] + rows, places)
        key_heads = torch.arange(counts.numel(), device=device)
        corner = key_heads // on.shape[1] * queries * heads
        corner = corner + key_heads % on.shape[1] * self.per_key_head
        tokens = rows if self.per_key_head == 1 else rows // self.per_key_head
        flat = tokens * heads + corner[lists]
        if self.per_key_head > 1:
            flat += rows % self.per_key_head
        self._index = flat.new_zeros(self.count).index_copy_(0, places, flat)
        self._places = flat.new_full((self.shape.numel(),), self.count).index_copy_(0, flat, places)
        # What fills up a short list comes after all its rows.
        self._numbers = rows.new_full((self.count,), on.shape[2] - 1).index_copy_(0, places, rows)
        for tile in self.tiles:
            if tile.whole:
                tile.of(self._numbers)[:] = torch.arange(on.shape[2], device=device)

    def empty(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a value of each row, shaped like x [B, T, H, ...]; the last is for heads off."""
        room = x.new_empty((self.count + 1, *x.shape[3:]), dtype=dtype)
        room[-1] = 0
        return room

    def gather(self, x: Tensor) -> Tensor:
        """Values [B, T, H, ...] of all rows, tile after tile."""
        return x.reshape(-1, *x.shape[3:]).index_select(0, self._index)

    def gather_once(self, x: Tensor) -> Tensor:
        """Like `gather`, but 0 for rows that only fill up a tile."""
        room = x.new_zeros((self.count + 1, *x.shape[3:]))
        return room.index_copy_(0, self._places, x.reshape(-1, *x.shape[3:]))[:-1]

    def scatter(self, x: Tensor) -> Tensor:
        """Back to [B, T, H, ...] from `empty`'s room; 0 where a head is off."""
        return x.index_select(0, self._places).unflatten(0, self.shape)

    def pieces(self, tile: Tile, dtype: torch.dtype) -> list[Piece]:
        """What to compute for a tile."""
        count, plain = tile.shape[2], self.mask is None and self.bias is None
        if not self.causal:
            return full_pieces(count, self.keys, count if plain else _MASKED_ROWS)
        if tile.whole and plain and self.per_key_head == 1 and self.offset == 0:
            return [Piece(slice(0, count), slice(0, count), "square")]
        limits = self._limits(tile)
        if not plain:
            return edge_pieces(limits, self.keys, _MASKED_ROWS)
        return causal_pieces(limits, self.keys, _EDGE_ROWS[dtype])

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
        shape = (*tile.shape[:2], piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start)
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
        return tuple(
            i if size > 1 else torch.zeros_like(i)
            for i, size in zip(self._coordinates(tile, piece.rows), x.shape, strict=False)
        )

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


def cut_into_tiles(on: Tensor) -> tuple[Tensor, list[Tile]]:
    """Cut `on` [B, Hkv, M], True for the rows to compute, into tiles.

    Returns:
        How many rows of each list are on, [B, Hkv], and the tiles, without empty ones.
    """
    paces, found, start = _paces(on), [], 0
    counts = paces[..., -1]
    for batch, heads in _cut(paces, slice(0, on.shape[0]), slice(0, on.shape[1])):
        inside = counts[batch, heads]
        whole = bool(inside.sum() >= _WHOLE * inside.numel() * on.shape[2])
        length = on.shape[2] if whole else int(inside.max())
        if inside.any():
            tile = Tile(batch, heads, (*inside.shape, length), start, whole)
            found.append(tile)
            start = tile.stop
    return counts, found


def _starts(tiles: list[Tile], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Of every list [B·Hkv]: where it starts among the rows of all tiles, whether it is whole."""
    starts = torch.zeros(shape, dtype=torch.long)
    whole = torch.zeros(shape, dtype=torch.bool)
    for tile in tiles:
        batch, heads, length = tile.shape
        inside = torch.arange(batch * heads).view(batch, heads) * length
        starts[tile.batch, tile.heads] = inside + tile.start
        whole[tile.batch, tile.heads] = tile.whole
    return starts.flatten(), whole.flatten()


def _paces(on: Tensor) -> Tensor:
    """Rows that are on up to each checkpoint, [B, Hkv, checkpoints], on the CPU."""
    step = max(1, -(-on.shape[2] // _CHECKPOINTS))
    parts = [part.sum(2) for part in on.split(step, dim=2)]
    return torch.stack(parts, dim=2).cumsum(2).cpu()


def _cut(paces: Tensor, batch: slice, heads: slice) -> list[tuple[slice, slice]]:
    """Cut where neighbours differ most, until the lists of every tile keep the same pace."""
    inside = paces[batch, heads]
    spread = int((inside.amax((0, 1)) - inside.amin((0, 1))).max())
    if spread <= max(_SLACK_ROWS, _SLACK_SHARE * float(inside[..., -1].double().mean())):
        return [(batch, heads)]
    over_batch, over_heads = _widest_step(inside), _widest_step(inside.transpose(0, 1))
    if over_batch[0] > over_heads[0]:
        middle = batch.start + over_batch[1]
        parts = [(slice(batch.start, middle), heads), (slice(middle, batch.stop), heads)]
    else:
        middle = heads.start + over_heads[1]
        parts = [(batch, slice(heads.start, middle)), (batch, slice(middle, heads.stop))]
    return [tile for part in parts for tile in _cut(paces, *part)]


def _widest_step(paces: Tensor) -> tuple[int, int]:
    """The largest difference between neighbours along the first dimension, and where it lies."""
    if paces.shape[0] == 1:
        return -1, 0
    steps = paces.diff(dim=0).abs().flatten(1).amax(1)
    return int(steps.max()), int(steps.argmax()) + 1
