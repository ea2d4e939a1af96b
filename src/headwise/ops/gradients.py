"""Whether a call will be differentiated, by what, or watched step by step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def learns(*tensors: Tensor) -> bool:
    """Whether gradients are on and any of the tensors wants one; or `by_formulas`."""
    return by_formulas() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def by_formulas() -> bool:
    """Whether `torch.func` differentiates, or gradients go forward.

    Torch's own operators have formulas for that. Ours have none; where gradients go forward, torch
    would take theirs for 0.
    """
    if torch.compiler.is_compiling():
        return False
    transforms = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(x.key() in _DERIVATIVES for x in transforms)


def is_mapped() -> bool:
    """Whether torch.vmap maps: no value decides what is computed then."""
    if torch.compiler.is_compiling():
        return False
    return any(x.key() == TransformType.Vmap for x in get_interpreter_stack() or ())


def differentiable_gradients(
    compute: Callable[..., Any], inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: a backward pass with create_graph wants them.

    A kernel's own backward has no formula; torch's operators, of which `compute` is made, have.

    Args:
        compute: What the kernel computes, of the inputs, in torch's operators.
        inputs: Of the kernel, as the backward pass saved them.
        outputs: The gradients of what `compute` returns.
    """
    # Views, or a tensor that is given twice would get the gradient of both in each place.
    views = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x in views if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(
        compute(*views), wanted, outputs, create_graph=True, allow_unused=True
    ))  # fmt: skip
    return [None if x is None or not x.requires_grad else next(found) for x in views]


def by_torch_alone() -> bool:
    """Whether torch's own operators must compute, and none of ours.

    These are calls `by_formulas`; and torch.export, whose programs run where headwise is not
    installed, and in ONNX.
    """
    return torch.compiler.is_exporting() or by_formulas()


def check_named(impl: str, *plain: str) -> None:
    """Refuse a named implementation where it cannot compute, though it could elsewhere.

    Where `by_formulas`, the `plain` ones can. The reference reads values, which torch.export does
    not have.
    """
    if impl == "reference" and torch.compiler.is_exporting():
        raise ValueError(
            "impl is 'reference', which loops over values and cannot be exported; 'auto' can be"
        )
    if impl not in plain and by_formulas():
        raise ValueError(
            f"impl is {impl!r}, which torch.func and forward gradients cannot differentiate; "
            f"{' and '.join(map(repr, plain))} can be"
        )


def is_watched(*tensors: Tensor) -> bool:
    """Whether something must see each step that torch takes, or there is no memory to read.

    That is torch.compile (which makes few kernels of many steps by itself), `torch.func`, forward
    gradients, a mode such as a counter of FLOPs, and tensors that are fake, sharded or quantised.
    """
    return (
        torch.compiler.is_compiling()
        or by_formulas()
        or _get_current_dispatch_mode() is not None
        or any(
            type(x) not in (Tensor, nn.Parameter) or is_functorch_wrapped_tensor(x) for x in tensors
        )
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether a kernel that no operator of torch stands for may read these.

    It has no gradients, and nothing sees its steps.
    """
    return not learns(*tensors) and not is_watched(*tensors)
