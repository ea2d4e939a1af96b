"""Collecting the routings of one forward of a model, whatever its layers return; their replay."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.nn import Router
from headwise.ops import Routing
from headwise.ops.fields import check
from headwise.ops.first_pass import mark_first_pass


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Inside the context, the dict holds the routings of the model's latest forward.

    Keys are the names of the routers, in the model's order ("model.layers.0.self_attn.router").
    Padding that the model is told of (`attention_mask`) is marked in them. A backward pass that
    computes a layer again (activation checkpointing) does not count twice. A model without routers
    leaves the dict empty.

    Raises:
        ValueError: If the model is no module.
        RuntimeError: During a forward under reentrant activation checkpointing, through which no
            gradient could reach a router; use use_reentrant=False.

    Example:
        >>> with headwise.record_routing(model) as routings:
        ...     model(input_ids)
        >>> headwise.balance_loss(routings["model.layers.0.self_attn.router"])
    """
    check("model", model, nn.Module)
    routings: dict[str, Routing] = {}
    running: list[Any] = []

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routings.clear()
        mask = named_arguments(model.forward, args, kwargs).get("attention_mask")
        running.append(collect_routings(model, routings, mask))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(start, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replay_routing(model: nn.Module, selection: Mapping[str, Routing]) -> Iterator[None]:
    """Inside the context, every router of the model chooses what was chosen before.

    Scores and gates are computed anew, with gradients: the choice is that of the engine that wrote
    a text, the rest that of the model as it learns from it.

    **Source**: Rollout Routing Replay, arXiv 2510.11370, for experts; for heads it is an extension.

    Args:
        model: Whose routers choose. Each is called once a forward, on the tokens of the selection;
            a backward pass that computes layers again belongs inside, too.
        selection: What `record_routing` collected from this model, or one of the same routers.

    Raises:
        ValueError: If the selection is of other routers, here; or of other tokens or candidates, in
            the forward.

    Example:
        >>> with headwise.record_routing(model) as selection:
        ...     model(input_ids)
        >>> with headwise.replay_routing(model, dict(selection)):
        ...     trainer.training_step(model, inputs)
    """
    check("model", model, nn.Module)
    check("selection", selection, Mapping[str, Routing])
    routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    if unlike := sorted(routers.keys() ^ selection.keys()):
        where = "selection" if unlike[0] in selection else "model"
        other = "model" if where == "selection" else "selection"
        raise ValueError(
            f"the {where} has a router {unlike[0]!r}, and the {other} has none of that name; the "
            "selection must be of this model"
        )

    def given(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"indices": selection[name].indices}

        return hook

    def checked(name: str) -> Any:
        def hook(_: nn.Module, __: Any, routing: Routing) -> None:
            here, there = (x.probabilities.shape[-1] for x in (routing, selection[name]))
            if here != there:
                raise ValueError(
                    f"selection[{name!r}] is of {there} candidates; the router has {here}"
                )

        return hook

    hooks = [m.register_forward_pre_hook(given(n), with_kwargs=True) for n, m in routers.items()]
    hooks += [router.register_forward_hook(checked(name)) for name, router in routers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def collect_routings(
    model: nn.Module,
    into: dict[str, Routing],
    attention_mask: Tensor | None = None,
    *,
    for_loss: bool = False,
) -> Iterator[None]:
    """While inside, every router of the model writes what it decides `into` the dict.

    `for_loss` tells forwards inside that the model's loss will have the balance losses.
    """
    with_grad = torch.is_grad_enabled()

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], routing: Routing) -> None:
            if with_grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} runs without gradients inside a forward with gradients, as reentrant "
                    "activation checkpointing does; use use_reentrant=False"
                )
            into[name] = mark_first_pass(routing)

        hook.for_loss = for_loss  # type: ignore[attr-defined]
        return hook

    routers = [(name, m) for name, m in model.named_modules() if isinstance(m, Router)]
    hooks = [router.register_forward_hook(keep(name)) for name, router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    # A 4-D mask says what is seen, not what is padding. Marking happens here, not in the hooks: a
    # checkpointed layer must do the same work when it is computed again without them.
    if attention_mask is not None and attention_mask.ndim == 2:
        into.update({name: _mark_padding(into[name], attention_mask.bool()) for name in into})


def is_collected(router: nn.Module) -> bool:
    """Whether somebody collects what a router decides."""
    return any(hasattr(hook, "for_loss") for hook in router._forward_hooks.values())


def is_collected_for_loss(model: nn.Module) -> bool:
    """Whether a forward that is under way will add the balance losses of the model's routers."""
    router = next((m for m in model.modules() if isinstance(m, Router)), None)
    hooks = {} if router is None else router._forward_hooks
    return any(getattr(hook, "for_loss", False) for hook in hooks.values())


def named_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, those given by position included."""
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs


def _mark_padding(routing: Routing, real: Tensor) -> Routing:
    # With a cache the mask covers the past too; the queries are its last columns.
    mask = real[:, -routing.indices.shape[1] :]
    extra = routing.indices.ndim - 1 - mask.ndim
    return routing.with_mask(mask.reshape(*mask.shape, *[1] * extra))
