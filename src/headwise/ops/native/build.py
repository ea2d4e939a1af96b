"""Compiles the kernels for this machine into the user's cache; checks them before they are kept."""

import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from headwise.ops import native
from headwise.ops.native.kernel_file import (
    FLAGS,
    SANITIZERS,
    cache_directory,
    key,
    name_of,
    refuse_what_others_may_write,
    sources,
)


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
    if found := native.library():
        return found
    if os.name == "nt":
        raise RuntimeError("they are for Linux and macOS")
    if missing := missing_tools():
        raise RuntimeError(f"{' and '.join(missing)} not found")
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_what_others_may_write(directory)
    with _alone(directory) as alone:
        native.forget()
        if found := native.library():
            return found
        if alone:
            _remove_what_is_left(directory)
        say("compiling, about half a minute …")
        with tempfile.TemporaryDirectory(dir=directory) as workshop:
            built = _compile(Path(workshop), SANITIZERS if sanitize else [])
            _check()
            built.chmod(0o755)
            # The name holds the checksum: whoever sees the file can tell whether it is whole.
            target = built.replace(directory / name_of(built))
    native.forget()
    return target


def missing_tools() -> list[str]:
    """What has to be installed before the kernels can be built."""
    compiler = os.environ.get("CXX", "c++")
    tools = {
        compiler: f"a C++ compiler ({compiler})",
        "ninja": "ninja (pip install 'headwise[compile]')",
    }
    return [name for tool, name in tools.items() if not shutil.which(tool, path=_path())]


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
    for unusable in directory.glob(f"native-{key()}*.so"):
        unusable.unlink()


def _compile(workshop: Path, more_flags: list[str]) -> Path:
    """Run compiler and linker; load what they built."""
    # It warns where CUDA's compiler lies beside no GPU; kernels for CPUs need neither.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.cpp_extension import load

    for file, text in sources().items():
        (workshop / file).write_text(text)
    path = os.environ.get("PATH")
    os.environ["PATH"] = _path()
    try:
        # Linked without -fopenmp: threads must be those of torch, not a second pool beside them.
        load(
            "headwise_native_build", [str(workshop / "library.cpp")],
            extra_cflags=FLAGS + more_flags, extra_ldflags=more_flags, is_python_module=False,
            build_directory=str(workshop),
        )  # fmt: skip
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise RuntimeError(_reason(str(error), workshop)) from error
    finally:
        os.environ.pop("PATH") if path is None else os.environ.update(PATH=path)
    (built,) = workshop.glob("*.so")
    return built


def _path() -> str:
    """Where tools are looked for: pip puts ninja beside Python, which need not be on PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def _reason(said: str, workshop: Path) -> str:
    """The line that matters of all that a compiler said."""
    if "No space left on device" in said:
        full = " or ".join(dict.fromkeys([str(workshop.parent), tempfile.gettempdir()]))
        return f"no space left in {full}"
    lines = said.splitlines()
    return next((line for line in lines if "error:" in line.lower()), lines[0])[:300]


def _check() -> None:
    """Refuse kernels that compute something else than torch does."""
    torch.manual_seed(0)
    ops = torch.ops.headwise_native
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        q, k, v = (torch.randn(1, 600, 2, 64, dtype=dtype) for _ in range(3))
        got, _ = ops.attention(q, k, v, torch.ones(1, 600, 2), True, 0.125)
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        want = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        want = want.transpose(1, 2)
        _compare(got, want, tolerance)
        got = ops.decode_attention(q[:, -1:], k, v, torch.ones(1, 1, 2), True, 0.125, None)
        _compare(got, want[:, -1:], tolerance)
        _compare(*_aggregated(q, k, v), tolerance)
        sizes = (200, 64), (1, 96, 64), (1, 64, 48)
        x, up, down = (torch.randn(*size, dtype=dtype) / 8 for size in sizes)
        weights, indices = torch.ones(200, 1), torch.zeros(200, 1, dtype=torch.long)
        gate, value = linear(x, up[0]).chunk(2, dim=-1)
        got = ops.expert_mlp(x, weights, indices, up, down, False)
        _compare(got, linear(silu(gate) * value, down[0]), tolerance)


def _aggregated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A window over a whole map of 5×5, and seven pooled keys: attention over 32 keys."""
    query, key, value = (x[:, :32].transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(query[:, :, :25], key, value, scale=0.125)
    got = torch.ops.headwise_native.aggregated_attention(
        q[:, :25] * 0.125, k[:, :25], v[:, :25], k[:, 25:32], v[:, 25:32], torch.ones(1, 25, 2),
        torch.zeros(2, 81), torch.zeros(2, 25, 7), q[:, :25], torch.zeros(2, 64, 81, dtype=q.dtype),
        torch.zeros(2, 81), 5, 5, 9,
    )  # fmt: skip
    return got, want.transpose(1, 2)


def _compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"the kernels are wrong on this processor in {want.dtype}")
