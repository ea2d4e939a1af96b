"""Where a model's heads can be seen: what each attention reads, and what reads its heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwise.hf.attention import attention_input
from headwise.hf.calibration import read_batch, routed_by
from headwise.nn import HeadBudget, QueryNormRouter

Batch = Mapping[str, Any]


class Site(NamedTuple):
    """An attention or MLP, and the linear map that reads its heads or neurons.

    Attributes:
        module: Its input [B, T, D] is what a router reads.
        output: Its input z [B, T, U] are the units: all channels of the heads, or the neurons.
    """

    module: nn.Module
    output: Any

    def metric(self, of_outputs: Tensor | None = None) -> Tensor:
        """W G Wᵀ [U, U] for y = z W, in which units weigh z W G Wᵀ z = y G y.

        Args:
            of_outputs: G [D, D]; None for 1, so that the square of what they add up to counts.
        """
        weight = self.output.weight.detach().double()
        weight = weight if isinstance(self.output, Conv1D) else weight.T
        return weight @ (weight.T if of_outputs is None else of_outputs @ weight.T)


def sites_of(model: Any, num_heads: Mapping[str, int], batch: Batch) -> list[Site]:
    """Attentions of a model of transformers; it runs the batch to find what reads their heads.

    Args:
        model: Not converted.
        num_heads: Of each attention, by its name.
        batch: Arguments of its forward.

    Raises:
        ValueError: If no linear map reads the heads of an attention.
    """
    found: dict[str, nn.Module] = {}
    waiting: list[str] = []

    # Of the linear maps that read as many channels, the first after the attention has computed
    # its heads. One of a gate may read what the attention does.
    def claim(linear: nn.Module, args: tuple[Any, ...]) -> None:
        if not waiting or not args or args[0].shape[-1] != widths[waiting[-1]]:
            return
        if args[0] is not inputs[waiting[-1]]:
            found[waiting.pop()] = linear

    attentions = {name: model.get_submodule(name) for name in num_heads}
    widths: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    all_on = [HeadBudget.resolve(heads, shared=heads, active=heads) for heads in num_heads.values()]
    routers = [QueryNormRouter(budget, scale_by_std=False) for budget in all_on]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    hooks = [linear.register_forward_pre_hook(claim) for linear in linears]
    for (name, attention), router in zip(attentions.items(), routers, strict=True):

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            inputs[name] = attention_input(args, kwargs)

        def wait(_: nn.Module, args: tuple[Tensor], __: Any, name: str = name) -> None:
            # Queries [B, T, H, C].
            widths[name] = args[0].shape[-2:].numel()
            waiting.append(name)

        hooks.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(router.register_forward_hook(wait))
    try:
        with routed_by(model, routers, list(num_heads)):
            read_batch(model, batch, 0)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in attentions if name not in found]:
        raise ValueError(
            f"{type(model).__name__} cannot be fitted: no linear map reads the heads of "
            f"{missing[0]}, so what they contribute is not known; take router 'query_norm'"
        )
    return [Site(module, found[name]) for name, module in attentions.items()]


def sites_of_diffusers(attentions: Sequence[Any]) -> list[Site]:
    """The same of a model of diffusers."""
    return [Site(attention, attention.to_out[0]) for attention in attentions]


@contextmanager
def watched(sites: Sequence[Site], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, every forward shows, site by site, what a module read and its units.

    Args:
        sites: What to watch.
        see: Gets the site's number, x [B, T, D] and z [B, T, U].
    """
    inputs: dict[int, Tensor] = {}

    def keep(site: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[site] = attention_input(args, kwargs)

        return hook

    def show(site: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(site, inputs.pop(site), args[0])

        return hook

    hooks = []
    for number, site in enumerate(sites):
        hooks.append(site.module.register_forward_pre_hook(keep(number), with_kwargs=True))
        hooks.append(site.output.register_forward_pre_hook(show(number)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def outputs_watched(sites: Sequence[Site], see: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, every forward shows what each site adds, y [B, T, D], and takes what see gives.

    Args:
        sites: What to watch.
        see: Gets the site's number and y.
    """

    def show(site: int) -> Any:
        return lambda _, args, y: see(site, y)

    hooks = [site.output.register_forward_hook(show(i)) for i, site in enumerate(sites)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
