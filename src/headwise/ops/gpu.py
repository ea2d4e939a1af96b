"""Whether kernels in Triton can compute something. `import headwise` does without Triton."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headwise.ops.gradients import learns

_INSTALLED = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether x is on a GPU whose kernels Triton makes: on Linux it comes along with torch."""
    return x.device.type == "cuda" and _INSTALLED


def is_plain(*tensors: Tensor) -> bool:
    """Whether a kernel that no operator of torch stands for may read these.

    Not where gradients, `torch.func` or torch.compile (which makes few kernels of many steps by
    itself) must see each step, nor where there is no memory to read: fake or sharded tensors.
    """
    seen = learns(*tensors) or torch.compiler.is_compiling() or forward_ad._current_level >= 0
    return not seen and all(
        type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors
    )
