"""What is written is whole, on the disk before it has its name, and known again by its sums."""

import json
import os
from pathlib import Path

import pytest

from headwise.results.files import check_manifest, put_in_place, write_manifest, write_whole


def tree(directory: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def test_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "file"
    write_whole(file, lambda partial: partial.write_text("old"))

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert tree(tmp_path) == {file: b"old"}


def test_directory_is_whole_or_not_there(tmp_path):
    target = tmp_path / "deep" / "model"

    def write(partial: Path) -> None:
        partial.mkdir()
        (partial / "weights").write_text("new")

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".model.partial").mkdir()  # left by a kill
    for _ in range(2):
        write_whole(target, write)
    assert tree(tmp_path / "deep") == {target: None, target / "weights": b"new"}


def test_all_is_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    partial, target = tmp_path / "partial", tmp_path / "model"
    (partial / "inner").mkdir(parents=True)
    files = [partial / "a", partial / "inner" / "b"]
    for file in files:
        file.write_text("new")
    done: list[object] = []
    fsync, replace = os.fsync, Path.replace
    names = {path.stat().st_ino: path for path in (*files, partial, partial / "inner", tmp_path)}

    def noting_fsync(number: int) -> None:
        done.append(names[os.fstat(number).st_ino])
        fsync(number)

    def noting_replace(path: Path, to: Path) -> Path:
        done.append("renamed")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    put_in_place(partial, target)
    assert {*done[:4]} == {*files, partial, partial / "inner"}
    assert done[4:] == ["renamed", tmp_path]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    return tmp_path


def test_sums_are_those_of_sha256sum(model):
    sums = json.loads((model / "manifest.json").read_text())
    assert list(sums) == ["a", "inner/b"]
    assert sums["a"] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_what_is_added_later_is_not_asked_for(model):
    (model / "README.md").write_text("mine")
    check_manifest(model, "")


@pytest.mark.parametrize("name", ["a", "inner/b", "manifest.json"])
def test_what_is_missing_is_named(model, name):
    (model / name).unlink()
    with pytest.raises(ValueError, match=f"^{model / name} is missing; make it again$"):
        check_manifest(model, "make it again")


def test_what_is_damaged_is_named(model):
    (model / "inner" / "b").write_text("inner/c")
    with pytest.raises(ValueError, match=f"^{model}/inner/b is damaged, .*; make it again$"):
        check_manifest(model, "make it again")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"null", b"\xff"])
def test_damaged_manifest_is_named(model, content):
    (model / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{model}/manifest.json cannot be read: .*; again"):
        check_manifest(model, "again")
