"""Building the kernels: killed, side by side, on a full disk, without tools; one line each."""

import fcntl
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.cli import main
from headwise.ops import native
from headwise.ops.native import build as builder
from headwise.ops.native import kernel_file

# What a process of its own runs: compile() in place of the compiler, then a build.
PROGRAM = """
import time
from pathlib import Path
from headwise.ops.native import build as builder

def compile(workshop, more_flags):
    file = workshop / "built.so"
    {compile}
    return file

builder._compile, builder.what_is_wrong = compile, lambda *_: ""
print(builder.build())
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test alone, where nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.forget()
    yield tmp_path / "cache" / "headwise"
    native.forget()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes no time; nothing here loads what it builds."""

    def compile(workshop: Path, _: list[str]) -> Path:
        (workshop / "built.so").write_bytes(b"kernels" * 100)
        return workshop / "built.so"

    monkeypatch.setattr(builder, "_compile", compile)
    monkeypatch.setattr(builder, "what_is_wrong", lambda *_: "")
    monkeypatch.setattr(kernel_file, "what_is_wrong", lambda *_: "")
    monkeypatch.setattr(builder, "missing_tools", str)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the compiler's place."""
    if missing := builder.missing_tools():
        pytest.skip(f"{missing} not found")

    def become(script: str) -> None:
        file = tmp_path / "c++"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))

    return become


def start(compile: str) -> subprocess.Popen:
    program = PROGRAM.format(compile=compile)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def fails(capsys: pytest.CaptureFixture) -> str:
    """The one line that `headwise compile` ends with."""
    with pytest.raises(SystemExit, match="1"):
        main(["compile"])
    said = capsys.readouterr().err
    assert said.startswith("headwise: cannot build the kernels: ")
    assert said.endswith("; everything works without, more slowly\n")
    assert said.count("\n") == 1
    return said


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"lock"}


@pytest.mark.usefixtures("quick")
def test_what_is_built_is_found_and_only_its_user_may_write_there(directory, capsys):
    main(["compile"])
    assert (
        capsys.readouterr().out == f"compiling, about a quarter of a minute …\n{native.library()}\n"
    )
    assert directory.stat().st_mode & 0o777 == 0o700
    main(["compile"])
    assert capsys.readouterr().out == f"built already: {native.library()}\n"
    assert left_in(directory) == {native.library().name}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"kernels" * 50])
def test_a_damaged_library_is_built_anew(directory, capsys, content):
    path = builder.build()
    path.write_bytes(content)
    native.forget()
    main(["compile"])
    assert capsys.readouterr().out == f"compiling, about a quarter of a minute …\n{path}\n"
    assert native.library() == path


@pytest.mark.usefixtures("quick")
def test_libraries_that_cannot_be_loaded_are_removed(directory):
    directory.mkdir(parents=True, mode=0o700)
    (directory / f"native-{kernel_file.own_key()}.so").touch()
    (directory / f"native-{kernel_file.own_key()}-0000.so").touch()
    (directory / "native-0123-4567.so").touch()
    path = builder.build()
    assert left_in(directory) == {path.name, "native-0123-4567.so"}


@pytest.mark.usefixtures("quick")
def test_what_a_killed_build_left_is_removed_by_the_next(directory):
    process = start("file.write_bytes(b'half'); print('began', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "began\n"
    process.kill()
    process.communicate()
    (workshop,) = left_in(directory)
    assert workshop.startswith("tmp")
    builder.build()
    assert left_in(directory) == {native.library().name}


@pytest.mark.usefixtures("quick")
def test_two_builds_at_a_time_are_one(directory, tmp_path):
    log = tmp_path / "log"
    compile = f"time.sleep(1); open({str(log)!r}, 'a').write('.'); file.write_bytes(b'kernels')"
    processes = [start(compile) for _ in range(2)]
    first, second = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second == f"{native.library()}\n"
    assert log.read_text() == "."
    assert left_in(directory) == {native.library().name}


@pytest.mark.usefixtures("quick")
def test_without_locks_what_may_be_in_use_stays(directory, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (directory / "tmp0").mkdir(parents=True)
    directory.chmod(0o700)
    assert builder.build() == native.library()
    assert left_in(directory) == {native.library().name, "tmp0"}


@pytest.mark.usefixtures("quick")
def test_a_directory_that_others_may_write_to_is_refused_by_name(directory, capsys):
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    said = fails(capsys)
    assert f"{directory} may be written to by others; run `chmod go-w {directory}`" in said
    assert left_in(directory) == set()


@pytest.mark.usefixtures("quick")
def test_a_file_in_place_of_the_cache_is_named(directory, capsys):
    directory.parent.touch()
    assert str(directory) in fails(capsys)


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a C++ compiler (no-such-compiler) not found" in fails(capsys)


def test_the_compilers_error_is_the_line(compiler, directory, capsys):
    compiler('echo "in file"; echo "library.cpp:7: error: no luck"; echo "note: x"; exit 1')
    assert "library.cpp:7: error: no luck;" in fails(capsys)
    assert left_in(directory) == set()


def test_a_compiler_that_does_not_run_is_named(compiler, capsys, tmp_path):
    compiler("")
    (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    assert str(tmp_path / "c++") in fails(capsys)


def test_a_full_disk_is_named(compiler, directory, capsys):
    compiler("echo \"x.s: Fatal error: 7 bytes: 'No space left on device'\"; exit 1")
    assert f"no space left in {directory}" in fails(capsys)
    assert left_in(directory) == set()


def test_a_disk_that_is_full_at_once_is_named(directory):
    if missing := builder.missing_tools():
        pytest.skip(f"{missing} not found")

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, "-m", "headwise", "compile"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files_only)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "File too large" in done.stderr
    assert left_in(directory) == set()


def test_real_kernels_that_were_cut_in_half_are_not_loaded(own_kernels, directory):
    whole = own_kernels
    directory.mkdir(parents=True, mode=0o700)
    half = directory / whole.name
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    half.chmod(0o755)
    assert native.what_is_missing() == (
        f"{half} is damaged; run `headwise compile`, which builds it anew"
    )
