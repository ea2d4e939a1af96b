"""How gathered attention cuts its work: pieces cover each visible key once, tiles keep one pace."""

import numpy as np
import pytest
import torch

from headwise.ops.attention import pieces, ragged
from headwise.ops.attention.pieces import causal_pieces, edge_pieces, full_pieces, staircase
from headwise.ops.attention.ragged import cut_into_tiles
from headwise.ops.plain_attention import Operands

KEYS = 131


@pytest.fixture(autouse=True)
def _exact_tiles(monkeypatch):
    monkeypatch.setattr(ragged, "_ROW_MULTIPLE", 1)


@pytest.fixture(params=[1, 4, 16])
def block(request, monkeypatch):
    """Sizes at which pieces are cut."""
    monkeypatch.setattr(pieces, "_ROW_BLOCK", request.param)
    monkeypatch.setattr(pieces, "_KEY_BLOCK", request.param)
    return request.param


def some_limits(rows):
    return torch.sort(torch.randint(KEYS, (2, 3, rows)), dim=2).values


@pytest.mark.parametrize("cut", [causal_pieces, edge_pieces])
@pytest.mark.parametrize("rows", [1, 7, 67])
def test_pieces_cover_each_visible_key_once(rows, cut, block):
    limits = some_limits(rows)
    covered = torch.zeros(2, 3, rows, KEYS)
    for piece in cut(limits, KEYS, edge_rows=5):
        seen = torch.ones(1)
        if piece.kind == "edge":
            seen = staircase(limits[:, :, piece.rows], piece.keys, torch.float32).exp()
        covered[:, :, piece.rows, piece.keys] += seen
    visible = torch.arange(KEYS) <= limits.unsqueeze(-1)
    assert torch.equal(covered, visible.float())


def test_rectangles_come_after_pieces_that_cover_every_row():
    limits = torch.arange(997).expand(2, 3, 997)
    kinds = [piece.kind for piece in causal_pieces(limits, 997, edge_rows=5)]
    first = kinds.index("rectangle")
    assert set(kinds[:first]) == {"edge"}
    assert set(kinds[first:]) == {"rectangle"}


def test_full_pieces_share_out_the_rows():
    assert [(p.rows.start, p.rows.stop, p.keys.stop) for p in full_pieces(7, 11, 3)] == [
        (0, 3, 11), (3, 6, 11), (6, 7, 11)
    ]  # fmt: skip


def tiles_of(on, whole_from=2.0):
    lists, rows = np.divmod(np.flatnonzero(on), on.shape[2])
    return cut_into_tiles(lists, rows, on.shape, whole_from)


def test_lists_of_one_pace_share_a_tile():
    on = np.random.default_rng(0).random((2, 5, 1024)) < 0.5
    counts, tiles = tiles_of(on)
    assert np.array_equal(counts, on.sum(2))
    assert [tile.shape for tile in tiles] == [(2, 5, on.sum(2).max())]


def test_a_busy_head_does_not_pad_the_others():
    on = np.random.default_rng(0).random((2, 5, 1024)) < 0.2
    on[:, 2] = True
    _, tiles = tiles_of(on, whole_from=0.9)
    assert [(t.heads.start, t.heads.stop, t.whole) for t in tiles] == [
        (0, 2, False), (2, 3, True), (3, 5, False)
    ]  # fmt: skip
    assert sum(np.prod(t.shape) for t in tiles) < 1.1 * on.sum() + 1


def test_a_padded_batch_entry_gets_a_tile_of_its_own():
    on = np.ones((3, 4, 512), dtype=bool)
    on[1, :, 100:] = False
    _, tiles = tiles_of(on)
    assert [(t.batch.start, t.batch.stop, t.shape[2]) for t in tiles] == [
        (0, 1, 512), (1, 2, 100), (2, 3, 512)
    ]  # fmt: skip


def test_heads_that_nobody_selected_are_in_no_tile():
    on = np.zeros((1, 3, 300), dtype=bool)
    assert tiles_of(on)[1] == []
    on[0, 1, :200] = True
    assert [(t.heads.start, t.heads.stop) for t in tiles_of(on)[1]] == [(1, 2)]


def test_places_of_rows_by_hand():
    """The example of `ragged`."""
    gate = torch.tensor([[[1, 0], [1, 1], [0, 0], [1, 1]]])
    x = torch.zeros(1, 4, 2, 1)
    rows = ragged.Rows(Operands(x, x, x, gate, causal=True), largest_share=1.0)
    assert [tile.shape for tile in rows.tiles] == [(1, 2, 3)]
    assert rows._numbers.tolist() == [0, 1, 3, 1, 3, 3]
    assert rows._index.tolist() == [0, 2, 6, 3, 7, 0]
    assert rows._places.tolist() == [0, 6, 1, 3, 6, 6, 2, 4]
