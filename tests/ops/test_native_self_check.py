"""The kernels' self-check: an illegal instruction, a wrong number, a broken file end in a line."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from headwise.ops import native
from headwise.ops.native import check, kernel_file, levels, self_check
from headwise.ops.native.build import build_level, missing_tools
from headwise.ops.native.self_check import what_is_wrong

ZEN_5 = {*levels.LEVELS["avx512_bf16"][1]}


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, no process is started."""

    def forbid() -> None:
        monkeypatch.setattr(self_check, "_in_a_child", lambda _: pytest.fail("it was kept"))

    return forbid


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Compiles a library that does something as it is loaded."""
    if missing := missing_tools():
        pytest.skip(f"{missing} not found")

    def compile(does: str) -> Path:
        source, library = tmp_path / "library.c", tmp_path / "library.so"
        source.write_text(f"__attribute__((constructor)) static void load(void) {{ {does}; }}")
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
        return library

    return compile


def test_right_kernels_pass_once(kernels, tmp_path, no_child):
    (library,) = [*(kernels / "headwise").glob("native-*.so"), *(kernels / "compiled").glob("*.so")]
    assert what_is_wrong(library, tmp_path) == ""
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("checked-")
    no_child()
    assert what_is_wrong(library, tmp_path) == ""


@pytest.mark.parametrize(
    ("does", "wrong"),
    [
        ("__builtin_trap()", "ended its check by SIG(ILL|TRAP)"),
        ("*(volatile int *)0 = 1", "ended its check by SIGSEGV|failed its check: .*ABORTING"),
        ("extern void _exit(int); _exit(3)", "failed its check: exit status 3"),
        ("", "failed its check: AttributeError.*attention"),
    ],
)
def test_what_ends_the_child_is_said_and_kept(program, tmp_path, no_child, does, wrong):
    library, results = program(does), tmp_path / "results"
    results.mkdir()
    said = what_is_wrong(library, results)
    assert re.match(wrong, said)
    no_child()
    assert what_is_wrong(library, results) == said


def test_a_file_that_is_no_library_is_said(tmp_path):
    (tmp_path / "library.so").write_bytes(b"kernels")
    said = what_is_wrong(tmp_path / "library.so", None)
    assert said.startswith("failed its check: OSError: ")


def test_what_was_killed_is_checked_again(program, tmp_path):
    library = program("extern int raise(int); raise(9)")
    assert what_is_wrong(library, tmp_path) == "ended its check by SIGKILL"
    assert list(tmp_path.glob("checked-*")) == []


@pytest.mark.usefixtures("native_kernels")
def test_other_numbers_than_those_of_torch_are_refused(monkeypatch):
    monkeypatch.setattr(check, "silu", torch.relu)
    with pytest.raises(RuntimeError, match=r"wrong on this processor in torch\.float32"):
        check.check(str(native.library()))


@pytest.mark.parametrize(
    ("missing", "levels_there"),
    [
        ((), ["avx512_bf16", "avx512", "avx2"]),
        (("avx512_bf16",), ["avx512", "avx2"]),
        (("avx512_vl",), ["avx2"]),
        (("avx2",), []),
    ],
)
def test_a_level_needs_all_of_its_instructions(monkeypatch, missing, levels_there):
    has = {name: name not in missing for name in ZEN_5}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    assert list(levels.levels_here()) == levels_there
    monkeypatch.setattr(levels.platform, "machine", lambda: "aarch64")
    assert list(levels.levels_here()) == []


class TestWheel:
    """Without `headwise compile`, beside the libraries of a wheel."""

    @pytest.fixture(autouse=True)
    def compiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        compiled = tmp_path / "compiled"
        compiled.mkdir()
        monkeypatch.setattr(kernel_file, "compiled_directory", lambda: compiled)
        native.forget()
        yield compiled
        native.forget()

    @pytest.mark.long
    def test_the_best_level_that_passes_is_taken(self, compiled, monkeypatch):
        if missing := missing_tools():
            pytest.skip(f"{missing} not found")
        if "avx2" not in levels.levels_here():
            pytest.skip("the processor lacks AVX2")
        monkeypatch.setattr(kernel_file, "levels_here", lambda: iter(["avx512", "avx2"]))
        (compiled / kernel_file.name_at("avx512")).write_bytes(b"no library")
        library = build_level("avx2", compiled)
        assert native.library() == library
        assert {path.name for path in compiled.iterdir()} == {
            kernel_file.name_at(level) for level in ("avx512", "avx2")
        }

    def test_without_one_that_passes_the_first_reason_is_said(self, compiled, monkeypatch):
        monkeypatch.setattr(kernel_file, "levels_here", lambda: iter(["avx512", "avx2"]))
        for level in ("avx512", "avx2"):
            (compiled / kernel_file.name_at(level)).write_bytes(b"no library")
        name = kernel_file.name_at("avx512")
        assert native.what_is_missing().startswith(f"{name} failed its check: OSError")

    def test_what_was_compiled_here_comes_first(self, compiled, own_kernels, tmp_path, monkeypatch):
        monkeypatch.setattr(kernel_file, "levels_here", lambda: iter(["avx2"]))
        (compiled / kernel_file.name_at("avx2")).write_bytes(b"no library")
        shutil.copytree(own_kernels.parent, tmp_path / "headwise", dirs_exist_ok=True)
        assert native.library() == tmp_path / "headwise" / own_kernels.name

    def test_libraries_of_another_source_are_not_taken(self, compiled, monkeypatch):
        monkeypatch.setattr(kernel_file, "levels_here", lambda: iter(["avx2"]))
        (compiled / "avx2-0123456789abcdef.so").write_bytes(b"no library")
        assert native.what_is_missing() == "they are not built; run `headwise compile` once"
