"""A causal triangle as rectangles without a mask and narrow edges with one.

The lower triangle of rows r_0 < r_1 < … splits into a rectangle (later rows, earlier keys) and two
smaller triangles, again and again. Rectangles need no mask, so torch's own attention runs on them
at full speed; only the last triangles, the edges, are masked. All lists of a tile are split at the
same ranks, and at a key that each of them sees there.

Example: four rows that see keys up to 1, 3, 4 and 7, in edges of two rows:

    key     0 1 2 3 4 5 6 7
    row 0   e e . . . . . .     e, f: the two edges
    row 1   e e e e . . . .
    row 2   r r r r f . . .     r: the rectangle, which rows 2 and 3 see whole
    row 3   r r r r f f f f
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# torch's CPU kernel works on blocks of rows and keys, and is faster where blocks are not cut.
_ROW_BLOCK, _KEY_BLOCK = 64, 64


class Piece(NamedTuple):
    """Rows and keys that are attended in one go.

    Attributes:
        rows: Ranks of the rows.
        keys: Positions of the keys.
        kind: "full": every row sees every key. "edge": some keys lie beyond a row's limit.
            "square": row i sees keys 0..i. "rectangle": like full, for rows that another piece has
            covered. Pieces of the other kinds cover each row once and come first.
    """

    rows: slice
    keys: slice
    kind: Literal["full", "edge", "square", "rectangle"]


def full_pieces(count: int, keys: int, at_a_time: int) -> list[Piece]:
    """Every row sees every key."""
    starts = range(0, count, at_a_time)
    return [Piece(slice(i, min(i + at_a_time, count)), slice(0, keys), "full") for i in starts]


def edge_pieces(limits: Tensor, keys: int, edge_rows: int) -> list[Piece]:
    """All keys up to each row's limit as edges, for where a mask is added anyway."""
    starts, _, ends = _splits(limits, keys, edge_rows)
    return [
        Piece(slice(starts[i], starts[i + 1]), slice(0, end), "edge") for i, end in enumerate(ends)
    ]


def causal_pieces(limits: Tensor, keys: int, edge_rows: int) -> list[Piece]:
    """Edges and rectangles that cover, for each row, the keys up to its limit.

    Args:
        limits: Last visible key of each row, [b, h, N], ascending in N, at least 0.
        keys: How many keys there are.
        edge_rows: About the fewest rows of an edge.
    """
    starts, splits, ends = _splits(limits, keys, edge_rows)
    pieces = [
        Piece(slice(starts[i], starts[i + 1]), slice(splits[i], end), "edge")
        for i, end in enumerate(ends)
    ]
    if splits[0] > 0:
        pieces.append(Piece(slice(0, limits.shape[2]), slice(0, splits[0]), "rectangle"))
    return pieces + _rectangles(starts, splits, 0, len(ends))


def _splits(limits: Tensor, keys: int, edge_rows: int) -> tuple[list[int], list[int], list[int]]:
    """Where the edges start among the rows, the keys before which all of an edge's rows see
    everything, and the keys at which an edge ends."""
    count = limits.shape[2]
    edges = max(1, count // edge_rows)
    starts = [count * i // edges // _ROW_BLOCK * _ROW_BLOCK for i in range(edges)] + [count]
    last = torch.tensor(starts[1:], device=limits.device) - 1
    first = torch.tensor(starts[:-1], device=limits.device)
    seen = limits[:, :, first].flatten(0, 1).amin(0).tolist()
    ends = limits[:, :, last].flatten(0, 1).amax(0).tolist()
    splits = [key // _KEY_BLOCK * _KEY_BLOCK for key in seen]
    return starts, splits, [min(keys, (end // _KEY_BLOCK + 1) * _KEY_BLOCK) for end in ends]


def _rectangles(starts: list[int], splits: list[int], first: int, last: int) -> list[Piece]:
    if last - first < 2:
        return []
    middle = (first + last) // 2
    halves = _rectangles(starts, splits, first, middle) + _rectangles(starts, splits, middle, last)
    if splits[middle] == splits[first]:
        return halves
    rows, keys = slice(starts[middle], starts[last]), slice(splits[first], splits[middle])
    return [Piece(rows, keys, "rectangle"), *halves]


def staircase(limits: Tensor, keys: slice, dtype: torch.dtype) -> Tensor:
    """0 for keys up to a row's limit, -inf beyond: [b, h, n, keys] to add to scores.

    Rows are copied out of one vector of zeros and -inf: five times faster than comparing.
    """
    width = keys.stop - keys.start
    zeros = torch.zeros(width, dtype=dtype, device=limits.device)
    steps = torch.cat([zeros, zeros + float("-inf")]).as_strided((width, width), (1, 1))
    rows = (keys.stop - 1) - limits
    return steps.index_select(0, rows.flatten()).unflatten(0, limits.shape)
