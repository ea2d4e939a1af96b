"""Whether kernels in Triton can compute something. `import headwise` does without Triton."""

from importlib.util import find_spec

from torch import Tensor

from headwise.ops.gradients import is_watched, learns

_INSTALLED = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether x is on a GPU whose kernels Triton makes: on Linux it comes along with torch."""
    return x.device.type == "cuda" and _INSTALLED


def is_plain(*tensors: Tensor) -> bool:
    """Whether a kernel that no operator of torch stands for may read these.

    It has no gradients, and nothing sees its steps.
    """
    return not learns(*tensors) and not is_watched(*tensors)
