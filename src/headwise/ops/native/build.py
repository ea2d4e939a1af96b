"""Compiles the kernels: for this machine into the user's cache, or for a wheel."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from headwise.ops import native
from headwise.ops.native.kernel_file import (
    SANITIZERS,
    cache_directory,
    name_at,
    name_of,
    own_key,
    own_library,
    refuse_what_others_may_write,
    sources,
)
from headwise.ops.native.levels import FLAGS, LEVELS, NATIVE
from headwise.ops.native.self_check import what_is_wrong


def build(say: Callable[[str], None] = lambda line: None, *, sanitize: bool = False) -> Path:
    """Compile the kernels for this machine, check them, keep them; returns where they are.

    Where they are built already, nothing happens; where another process builds them, this one
    waits. A library that is damaged is built anew.

    Args:
        say: Called with a line before the compiler starts.
        sanitize: Let AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels: for tests
            of these, in a process that has both preloaded (`make sanitize`).

    Raises:
        RuntimeError: If a tool is missing, the compiler fails, the result is wrong here, or others
            may write to the cache.
        OSError: If the cache cannot be written to.
    """
    if found := own_library():
        return found
    if os.name == "nt":
        raise RuntimeError("they are for Linux and macOS")
    if missing := missing_tools():
        raise RuntimeError(f"{missing} not found")
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_what_others_may_write(directory)
    with _alone(directory) as alone:
        if found := own_library():
            return found
        if alone:
            _remove_what_is_left(directory)
        say("compiling, about a quarter of a minute …")
        with tempfile.TemporaryDirectory(dir=directory) as workshop:
            built = _compile(Path(workshop), NATIVE + (SANITIZERS if sanitize else []))
            built.chmod(0o755)
            if wrong := what_is_wrong(built, directory):
                raise RuntimeError(f"what the compiler made {wrong}")
            # The name holds the checksum: whoever sees the file can tell whether it is whole.
            target = built.replace(directory / name_of(built))
    native.forget()
    return target


def build_level(level: str, directory: Path) -> Path:
    """Compile the kernels for a level of processors, as a wheel has them."""
    flags, _ = LEVELS[level]
    with tempfile.TemporaryDirectory(dir=directory) as workshop:
        older = str(Path(workshop, "older_systems.h"))
        built = _compile(Path(workshop), [*flags, "-include", older, "-s"])
        return built.replace(directory / name_at(level))


def missing_tools() -> str:
    """What has to be installed before the kernels can be built; nothing where it is there."""
    compiler = _compiler()
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Wait until no other process builds; False where the file system has no locks.

    The system takes the lock back from a process that ends, however it ends.
    """
    import fcntl  # Windows has none, and no kernels.

    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _remove_what_is_left(directory: Path) -> None:
    """Of builds that were killed, their workshops; of this key, libraries that cannot be loaded."""
    for workshop in directory.glob("tmp*"):
        # The compiler of a killed build may still write there: it fails, the next build removes it.
        shutil.rmtree(workshop, ignore_errors=True)
    for unusable in directory.glob(f"native-{own_key()}*.so"):
        unusable.unlink()


def _compile(workshop: Path, more_flags: list[str]) -> Path:
    """What the compiler makes of the kernels."""
    for file, text in sources().items():
        (workshop / file).write_text(text)
    built, of_torch = workshop / "built.so", Path(torch.__file__).parent
    command = [
        _compiler(), *FLAGS, *more_flags, "-w", str(workshop / "library.cpp"), "-o", str(built),
        f"-isystem{of_torch / 'include'}", f"-L{of_torch / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = done.stdout.strip() or f"{command[0]} ended with status {done.returncode}"
        raise RuntimeError(_reason(said, workshop))
    return built


def _reason(said: str, workshop: Path) -> str:
    """The line that matters of all that a compiler said."""
    if "No space left on device" in said:
        full = " or ".join(dict.fromkeys([str(workshop.parent), tempfile.gettempdir()]))
        return f"no space left in {full}"
    lines = said.splitlines()
    return next((line for line in lines if "error:" in line.lower()), lines[0])[:300]


if __name__ == "__main__":  # python -m headwise.ops.native.build DIRECTORY, for a wheel
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for name in LEVELS:
        print(build_level(name, Path(sys.argv[1])), flush=True)
