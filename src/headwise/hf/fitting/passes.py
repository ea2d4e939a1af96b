"""The passes over a text that a fit takes, for layers of heads and of experts alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf.calibration import Batches, check_batches, read_batch
from headwise.hf.conversion import Converted
from headwise.hf.fitting.layer import Layer
from headwise.hf.fitting.sites import outputs_watched, watched
from headwise.hf.fitting.solving import RidgeRegression, gains
from headwise.progress import followed

# Share of the batches that is held out to choose the regression's penalty.
_HELD_OUT = 1 / 8
# Shares of the batches that gradients take, which cost most, and costs and gains, which are few
# numbers to estimate.
_OF_GRADIENTS = 1 / 2
OF_FEW_NUMBERS = 1 / 4
_GOLDEN = 0.6180339887498949
# Tokens for each weight that a score has.
_TOKENS_PER_WEIGHT = 4
# What contributes less than units of this square would is taken for so much in its logarithm.
_LEAST = 1e-12


def check_can_be_fitted(model: Any, router: str) -> None:
    """Raises ValueError unless the model is an original, and the router one that is fitted."""
    if router != "fitted":
        raise ValueError(f"router is {router!r}; of what is fitted it must be 'fitted'")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a model of transformers or diffusers"
        )
    if isinstance(model, Converted):
        raise ValueError(f"{type(model).__name__} is converted already; fit the original")


def check_can_be_fitted_to(batches: Batches) -> None:
    """Raises ValueError unless there are two batches or more, labelled in all of them or none."""
    check_batches(batches, labelled=False)
    if any("labels" in batch for batch in batches):
        check_batches(batches, labelled=True)
    if len(batches) < 2:
        raise ValueError("batches has 1 batch; there must be 2 or more, one of them held out")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode, and there are no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def measure_metrics(model: Any, batches: Batches, layers: Sequence[Layer]) -> None:
    """M of each layer, W G Wᵀ with G = E[g gᵀ] of g = ∂L/∂y; without labels G = 1.

    y is what the layer adds, of z the linear map W. So M = E[u uᵀ] of u = ∂L/∂z.
    """
    if "labels" not in batches[0]:
        for layer in layers:
            layer.metric = layer.site.metric().float()
        return
    sums: list[Any] = [0.0] * len(layers)
    tokens = 0
    for number, batch in _part(batches, _OF_GRADIENTS, "gradients"):
        outputs: dict[int, Tensor] = {}

        def keep(i: int, y: Tensor, outputs: dict[int, Tensor] = outputs) -> Tensor:
            outputs[i] = y if y.requires_grad else y.detach().requires_grad_()
            return outputs[i]

        with torch.enable_grad(), outputs_watched([layer.site for layer in layers], keep):
            loss = getattr(read_batch(model, batch, number), "loss", None)
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} gives no loss for the labels in batches; leave them "
                    "out (headwise.fit then needs allocate='alike')"
                )
            if not loss.isfinite():
                raise ValueError(
                    f"batches[{number}] has a loss of {loss.item()}; it must be finite"
                )
            # Of the sum over tokens, so that a token counts alike in batches of any length.
            total = loss * (batch["labels"] != -100).sum()
            gradients = torch.autograd.grad(total, list(outputs.values()))
        for i, gradient in zip(outputs, gradients, strict=True):
            g = _tokens(batch, gradient).double()
            sums[i] = sums[i] + g.T @ g
        tokens += len(g)
    for layer, total in zip(layers, sums, strict=True):
        layer.metric = layer.site.metric(total / tokens).float()


def fit_scores(model: Any, batches: Batches, layers: Sequence[Layer]) -> None:
    """The fit of each layer: log c, and on top of it its variance."""
    sums = [RidgeRegression(layer.dim, layer.budget.routed_groups) for layer in layers]
    least = [_LEAST * float(layer.metric.diagonal().mean()) for layer in layers]

    def see(number: int, i: int, x: Tensor, z: Tensor) -> None:
        squares = layers[i].contributions(z).clamp_min(least[i])
        sums[i].add(x, squares.log() / 2, held_out=_is_in(_HELD_OUT, number - 1))

    run(model, batches, layers, see, "contributions")
    for layer, regression in zip(layers, sums, strict=True):
        needed = _TOKENS_PER_WEIGHT * (layer.dim + 1)
        if regression.num_rows < needed:
            raise ValueError(
                f"batches hold {regression.num_rows:,} tokens to fit to; a score has "
                f"{layer.dim + 1:,} weights, so at least {needed:,} are needed"
            )
        fit = regression.solve()
        layer.fit = fit._replace(bias=fit.bias + fit.variance)


def measure_gains(model: Any, batches: Batches, layers: Sequence[Layer]) -> None:
    """The gain of each group, in layers that choose."""
    sums: list[Any] = [(0.0, 0.0)] * len(layers)

    def see(_: int, i: int, x: Tensor, z: Tensor) -> None:
        if not layers[i].keeps_all:
            sums[i] = [
                total + part for total, part in zip(sums[i], layers[i].products(x, z), strict=True)
            ]

    run(model, batches, layers, see, "gains", share=OF_FEW_NUMBERS)
    for layer, of_layer in zip(layers, sums, strict=True):
        if not layer.keeps_all:
            layer.gain = gains(*of_layer)


def run(
    model: Any,
    batches: Batches,
    layers: Sequence[Layer],
    see: Callable[[int, int, Tensor, Tensor], None],
    title: str,
    *,
    share: float = 1.0,
) -> None:
    """Let see the tokens of that share of the batches, padding left out.

    It gets the numbers of the batch and of the layer among these, x [N, D] and z [N, U].
    """
    sites = [layer.site for layer in layers]
    for number, batch in _part(batches, share, title):

        def show(i: int, x: Tensor, z: Tensor, number: int = number, batch: Any = batch) -> None:
            see(number, i, _tokens(batch, x), _tokens(batch, z))

        # No loss is asked for.
        with watched(sites, show):
            unlabelled = {name: x for name, x in batch.items() if name != "labels"}
            read_batch(model, unlabelled, number)


def _part(batches: Batches, share: float, title: str) -> Iterator[tuple[int, Any]]:
    """That share of the batches, each with its number, under progress of that title."""
    chosen = [(i, batch) for i, batch in enumerate(batches) if _is_in(share, i)]
    yield from followed(chosen, title, total=len(chosen))


def _is_in(share: float, number: int) -> bool:
    """Whether a batch is among that share of them, spread evenly: over texts in a row or in turns.

    The first one is. Multiples of the golden ratio are spread so, modulo 1.
    """
    return (number * _GOLDEN) % 1 < share


def _tokens(batch: Any, x: Tensor) -> Tensor:
    """x [B, T, …] without padding, one row a token."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != x.shape[:2]:
        return x.flatten(0, 1)
    return x[mask.bool()]
