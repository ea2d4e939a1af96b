"""The file of the kernels: which one, and what has to be right before it is loaded.

    headwise/ops/native/compiled/LEVEL-KEY.so               in a wheel, for levels of processors
    $XDG_CACHE_HOME/headwise/native-KEY-PROCESSOR-SUM.so    by `headwise compile`, for this machine

KEY stands for source and flags, PROCESSOR for its instructions, SUM for the bytes of the file. They
speak to torch through its stable interface: one file serves torch 2.11 and all later ones. A file
in the cache that was cut short would load, and end the process with SIGBUS once something missing
is touched; one that others may write to could do anything. What passes is checked once on a
machine, in a process of its own (`self_check`).
"""

import hashlib
import os
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.ops.native.levels import FLAGS, instructions, levels_here
from headwise.ops.native.self_check import what_is_wrong

# Libraries with sanitizers are for a cache of their own: they load only where these came first.
SANITIZERS = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
    "-g",
]  # fmt: skip
_HERE = files("headwise.ops.native")


class NoKernelsError(HeadwiseError, RuntimeError):
    """Why no kernels can be loaded, and what to do, in a line."""


def find() -> Path:
    """The library of kernels for this source and processor: the own one, else one of the wheel."""
    problems = []
    for find_one in (_of_this_machine, _of_the_wheel):
        try:
            for path in find_one():
                wrong = what_is_wrong(path, _results())
                if not wrong:
                    return path
                problems.append(f"{path.name} {wrong}")
        except (NoKernelsError, OSError) as error:
            problems.append(str(error))
    raise NoKernelsError(
        problems[0] if problems else "they are not built; run `headwise compile` once"
    )


def own_library() -> Path | None:
    """What `headwise compile` built for this source and processor, if it is whole."""
    try:
        return next(_of_this_machine(), None)
    except (NoKernelsError, OSError):
        return None


def _of_this_machine() -> Iterator[Path]:
    directory = cache_directory()
    built = sorted(directory.glob(f"native-{own_key()}-*.so"))
    for path in (directory, *built) if built else ():
        refuse_what_others_may_write(path)
    for path in built:
        if path == directory / name_of(path):
            yield path
            return
    if built:
        raise NoKernelsError(f"{built[0]} is damaged; run `headwise compile`, which builds it anew")


def _of_the_wheel() -> Iterator[Path]:
    for level in levels_here():
        path = compiled_directory() / name_at(level)
        if path.exists():
            yield path


def compiled_directory() -> Path:
    """Where a wheel has its libraries."""
    return Path(str(_HERE.joinpath("compiled")))


def _results() -> Path | None:
    """Where results of checks are kept; None where that cannot be trusted."""
    try:
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_what_others_may_write(directory)
    except (NoKernelsError, OSError):
        return None
    return directory


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
    """The name of a library in the cache: what it was built from and for, and what is in it."""
    return f"native-{own_key()}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


def name_at(level: str) -> str:
    """The name of a wheel's library."""
    return f"{level}-{key()}.so"


@cache
def key() -> str:
    """Sixteen characters that change with the source and the flags."""
    return _digest(*sources().values(), *FLAGS)


@cache
def own_key() -> str:
    """`key`, and sixteen characters that change with the processor."""
    return f"{key()}-{_digest(instructions())}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """The text of each source file, by name."""
    kernels = _HERE.joinpath("kernels")
    names = sorted(file.name for file in kernels.iterdir())
    return {name: kernels.joinpath(name).read_text() for name in names}
