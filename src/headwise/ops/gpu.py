"""Whether kernels in Triton can compute something. `import headwise` does without Triton."""

from importlib.util import find_spec

from torch import Tensor

_INSTALLED = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether x is on a GPU whose kernels Triton makes: on Linux it comes along with torch."""
    return x.device.type == "cuda" and _INSTALLED
