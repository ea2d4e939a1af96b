"""The file of the kernels in the user's cache, and what has to be right before it is loaded.

    $XDG_CACHE_HOME/headwise/native-KEY-SUM.so

KEY stands for source, torch and processor, SUM for the bytes of the file. A file that was cut short
would load, and end the process with SIGBUS once something missing is touched; a file that others
may write to could do anything.
"""

import hashlib
import os
import platform
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from headwise.errors import HeadwiseError

FLAGS = [
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip
# For a cache of its own: the library then loads only where the sanitizers came first.
SANITIZERS = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
    "-g",
]  # fmt: skip
_SOURCES = files("headwise.ops.native").joinpath("kernels")


class NoKernelsError(HeadwiseError, RuntimeError):
    """Why no kernels can be loaded, and what to do, in a line."""


def find() -> Path:
    """The library of kernels for this source, torch and processor."""
    directory = cache_directory()
    built = sorted(directory.glob(f"native-{key()}-*.so"))
    if not built:
        raise NoKernelsError("they are not built; run `headwise compile` once")
    for path in (directory, *built):
        refuse_what_others_may_write(path)
    for path in built:
        if path == directory / name_of(path):
            return path
    raise NoKernelsError(f"{built[0]} is damaged; run `headwise compile`, which builds it anew")


def cache_directory() -> Path:
    """Where libraries are kept. A relative XDG_CACHE_HOME is ignored, as its standard says."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():
        try:
            home = Path.home() / ".cache"
        except RuntimeError:
            raise NoKernelsError("there is no home directory; set XDG_CACHE_HOME") from None
    return home / "headwise"


def refuse_what_others_may_write(path: Path) -> None:
    """Code is loaded out of files that nobody but this user and root may write to."""
    about = path.stat()
    if about.st_uid not in (0, os.geteuid()):
        raise NoKernelsError(
            f"{path} belongs to another user (number {about.st_uid}); remove it, or set "
            "XDG_CACHE_HOME to a directory of your own"
        )
    if about.st_mode & 0o022:
        command = f"chmod go-w {shlex.quote(str(path))}"
        raise NoKernelsError(f"{path} may be written to by others; run `{command}`")


def name_of(file: Path) -> str:
    """The name of a library: what it was built from and what is in it."""
    return f"native-{key()}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


@cache
def key() -> str:
    """Sixteen characters that change with the source, torch and the processor."""
    about = (*sources().values(), torch.__version__, platform.machine(), *FLAGS, _instructions())
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """The text of each source file, by name."""
    names = sorted(file.name for file in _SOURCES.iterdir())
    return {name: _SOURCES.joinpath(name).read_text() for name in names}


def _instructions() -> str:
    """The line of Linux that lists what the processor knows: "flags", on Arm "Features"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
