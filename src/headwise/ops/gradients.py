"""Whether a call will be differentiated, or watched step by step."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def learns(*tensors: Tensor) -> bool:
    """Whether gradients are on and any of the tensors wants one."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_watched(*tensors: Tensor) -> bool:
    """Whether something must see each step that torch takes, or there is no memory to read.

    That is torch.compile (which makes few kernels of many steps by itself), `torch.func`, forward
    gradients, a mode such as a counter of FLOPs, and tensors that are fake, sharded or quantised.
    """
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
        or any(
            type(x) not in (Tensor, nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(x)
            for x in tensors
        )
    )
