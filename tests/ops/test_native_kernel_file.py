"""The library of kernels in the user's cache: found by name, whole, written by nobody else."""

import logging
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headwise.ops import head_attention, native
from headwise.ops.native import kernel_file


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_file, "what_is_wrong", lambda *_: "")
    monkeypatch.setattr(kernel_file, "compiled_directory", lambda: tmp_path / "compiled")
    native.forget()
    native._say_once.cache_clear()
    directory = tmp_path / "headwise"
    directory.mkdir(mode=0o700)
    yield directory
    native.forget()


@pytest.fixture
def built(directory: Path) -> Path:
    """A file that bears the right name; nothing here loads it."""
    new = directory / "new"
    new.write_bytes(b"kernels" * 100)
    new.chmod(0o755)
    return new.replace(directory / kernel_file.name_of(new))


def attend(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, tokens, 2, 6, dtype=dtype)
    return head_attention(q, k, v, torch.ones(1, tokens, 2, dtype=dtype))


def test_a_whole_library_is_found(built):
    assert native.is_built()
    assert native.library() == built
    assert native.what_is_missing() == ""


def test_without_one_the_command_is_named(directory):
    assert not native.is_built()
    with pytest.raises(ValueError, match="not built; run `headwise compile` once"):
        native.kernels()


def test_of_another_processor_it_is_not_found(built, monkeypatch):
    monkeypatch.setattr(kernel_file, "instructions", lambda: "flags: fpu")
    kernel_file.own_key.cache_clear()
    assert not native.is_built()
    kernel_file.own_key.cache_clear()


@pytest.mark.parametrize(
    "content", [b"", b"kernels" * 50, b"kernels" * 101, b"kernelz" * 100], ids=len
)
def test_a_damaged_library_is_not_loaded(built, content):
    built.write_bytes(content)
    assert not native.is_built()
    with pytest.raises(ValueError, match=rf"{built} is damaged; run `headwise compile`"):
        native.kernels()


def test_a_whole_library_is_found_beside_a_damaged_one(built, directory):
    (directory / f"native-{kernel_file.own_key()}-0000.so").write_bytes(b"")
    assert native.library() == built


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("what", ["library", "directory"])
def test_what_others_may_write_to_is_refused_by_name(built, directory, what, mode):
    path = built if what == "library" else directory
    path.chmod(mode)
    assert native.library() is None
    said = f"{path} may be written to by others; run `chmod go-w {path}`"
    assert native.what_is_missing() == said
    path.chmod(mode & ~0o022)
    native.forget()
    assert native.library() == built


@pytest.mark.parametrize("what", ["library", "directory"])
def test_what_belongs_to_others_is_refused_by_name(built, directory, what, monkeypatch):
    path = built if what == "library" else directory
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert native.library() is None
    assert native.what_is_missing().startswith(f"{path} belongs to another user (number ")


@pytest.mark.skipif(os.geteuid() != 0, reason="a file of root's is needed")
def test_what_belongs_to_root_is_loaded(built, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert native.library() == built


def test_a_relative_cache_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kernel_file.cache_directory() == tmp_path / "home" / ".cache" / "headwise"


def test_without_a_home_all_works_without_kernels(monkeypatch):
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert native.what_is_missing() == "there is no home directory; set XDG_CACHE_HOME"
    assert attend(300).isfinite().all()


def test_a_file_where_the_cache_should_be_is_no_obstacle(directory):
    directory.rmdir()
    directory.touch()
    assert attend(300).isfinite().all()


def test_it_is_looked_for_once(built, monkeypatch):
    looked = []
    monkeypatch.setattr(native, "find", lambda: looked.append(1) or built)
    assert all(native.is_built() for _ in range(5))
    assert looked == [1]


def test_the_first_op_that_would_gain_says_so_once(caplog):
    attend(300)
    attend(300)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("headwise.ops.native", logging.WARNING)
    assert "without its C++ kernels" in record.getMessage()
    assert "run `headwise compile` once" in record.getMessage()


def test_an_op_that_would_not_gain_says_nothing(caplog):
    attend(20)
    attend(300, torch.float64)
    assert caplog.records == []


def test_with_kernels_nothing_is_said(built, caplog):
    assert native.is_ready()
    assert caplog.records == []


def test_a_graph_has_no_place_where_it_is_said():
    program = """
import torch
from headwise import MoHAttention
layer = MoHAttention(20, num_heads=5, shared_heads=2, active_heads=3)
compiled = torch.compile(layer, fullgraph=True, backend="eager")
for tokens in (150, 160, 170):
    x = torch.randn(1, tokens, 20)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its C++ kernels") == 1
