"""`headwise compile`: the CPU kernels, built for this machine."""

from functools import partial

from headwise.ops.native.build import build
from headwise.ops.native.kernel_file import NoKernelsError, own_library
from headwise.parsing import called


def main(argv: list[str]) -> None:
    """Run the command."""
    called(compile_kernels, argv, "headwise compile")


def compile_kernels() -> None:
    """Build the CPU kernels for this machine: once, needs a C++ compiler."""
    if built := own_library():
        print(f"built already: {built}")
        return
    try:
        print(build(say=partial(print, flush=True)))
    except (RuntimeError, OSError) as error:
        raise NoKernelsError(
            f"cannot build the kernels: {error}; everything works without, more slowly"
        ) from error
