"""Tokens that come as a Parquet file: taken as they are, or refused with the file's name."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from headwise.data.token_files import token_rows
from headwise.errors import UnreadableError


def written(path: Path, rows: list, kind: pyarrow.DataType | None = None) -> Path:
    parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(rows, kind)}), path)
    return path


@pytest.mark.parametrize("kind", [pyarrow.int8(), pyarrow.uint16(), pyarrow.int64()])
@pytest.mark.parametrize(
    "listed", [pyarrow.list_, pyarrow.large_list, lambda x: pyarrow.list_(x, 3)]
)
def test_rows_of_any_integers_are_taken_as_they_are(tmp_path, kind, listed):
    rows = [[1, 2, 3], [5, 7, 127]]
    taken = token_rows(written(tmp_path / "a.parquet", rows, listed(kind)))
    assert [row.tolist() for row in taken] == rows
    assert {row.dtype for row in taken} == {np.dtype(np.int32)}


def test_rows_of_several_lengths_and_the_largest_token(tmp_path):
    rows = [[2**31 - 1], [], [0, 3]]
    assert [r.tolist() for r in token_rows(written(tmp_path / "a.parquet", rows))] == rows


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([[3, 2**32 + 5]], "has token 4294967301; tokens lie in 0..2147483647"),
        ([[2**31]], "has token 2147483648"),
        ([[-1, 3]], "has token -1"),
        ([[1.9, 3.0]], r"holds list<\w+: double>; it must hold lists of integers"),
        ([["3"]], r"holds list<\w+: string>"),
        ([3, 5], "holds int64"),
        (["3 5"], "holds string"),
        ([[[3]]], r"holds list<"),
        ([[3], None], r"has gaps \(null\)"),
        ([[3, None]], r"has gaps \(null\)"),
    ],
)
def test_what_is_no_token_is_refused_before_it_becomes_another_one(tmp_path, rows, why):
    file = written(tmp_path / "a.parquet", rows)
    with pytest.raises(UnreadableError, match=rf"{file} {why}|of {file} {why}"):
        token_rows(file)


@pytest.mark.parametrize("content", [b"", b"[[3, 5]]", b"PAR1 PAR1"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"a\.parquet cannot be read as a Parquet file: "):
        token_rows(tmp_path / "a.parquet")
