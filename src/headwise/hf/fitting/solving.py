"""The closed forms: a ridge regression, gains of what is on, and a budget spent over layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Of the mean square of a feature. Regressions of attention's inputs are best around 1e-2.
_PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
# Towards a gain of 1, of the mean square of a unit that is on.
_GAIN_PENALTY = 1e-3


class Fit(NamedTuple):
    """y ≈ weight x + bias, with the variance of what it leaves of y, on rows not fitted to."""

    weight: Float[Tensor, "R D"]
    bias: Float[Tensor, " R"]
    variance: Float[Tensor, " R"]


class RidgeRegression:
    """Ridge regression of R targets on [x, 1], from sums in float64: rows are not kept.

    A part of the rows is held out to choose the penalty, and then fitted to as well.
    """

    def __init__(self, dim: int, num_targets: int):
        # Of the rows to fit to, and of those held out.
        self._gram = torch.zeros(2, dim + 1, dim + 1, dtype=torch.float64)
        self._cross = torch.zeros(2, dim + 1, num_targets, dtype=torch.float64)
        self._squares = torch.zeros(2, num_targets, dtype=torch.float64)

    def add(
        self, x: Float[Tensor, "N D"], y: Float[Tensor, "N R"], *, held_out: bool = False
    ) -> None:
        """Count these rows in."""
        features = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = y.double()
        part = int(held_out)
        self._gram[part] += (features.T @ features).cpu()
        self._cross[part] += (features.T @ y).cpu()
        self._squares[part] += y.square().sum(0).cpu()

    @property
    def num_rows(self) -> int:
        """Rows to fit to, and held out."""
        return round(float(self._gram[:, -1, -1].sum()))

    def solve(self) -> Fit:
        """The fit to all rows, with the penalty that is best on those held out."""
        fits = [self._minimum(self._gram[0], self._cross[0], penalty) for penalty in _PENALTIES]
        best = min(range(len(fits)), key=lambda i: float(self._held_out_errors(fits[i]).sum()))
        weight = self._minimum(self._gram.sum(0), self._cross.sum(0), _PENALTIES[best])
        variance = self._held_out_errors(fits[best]) / self._gram[1, -1, -1]
        return Fit(weight[:-1].T.float(), weight[-1].float(), variance.float())

    @staticmethod
    def _minimum(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
        # The constant is not penalised.
        on_features = gram.new_ones(len(gram)) * penalty * gram.diagonal()[:-1].mean()
        on_features[-1] = 0
        return torch.linalg.solve(gram + on_features.diag(), cross)

    def _held_out_errors(self, weight: Tensor) -> Tensor:
        """Σ (y - weightᵀ[x, 1])² over the rows held out, target by target."""
        squared = (weight * (self._gram[1] @ weight)).sum(0)
        return (self._squares[1] - 2 * (weight * self._cross[1]).sum(0) + squared).clamp_min(0)


def gains(on: Float[Tensor, "U U"], with_all: Float[Tensor, " U"]) -> Float[Tensor, " U"]:
    """The factors a of least squares ‖Σ v_u - Σ a_u m_u v_u‖², drawn a little towards 1.

    Args:
        on: Sums over tokens of m_u m_w v_u·v_w, where m is 1 for units that are on and 0 for the
            others. A unit that is never on gets 1.
        with_all: Sums of m_u v_u · Σ_w v_w over all w.
    """
    penalty = _GAIN_PENALTY * on.diagonal().mean().clamp_min(torch.finfo(on.dtype).tiny)
    a = torch.linalg.solve(on + penalty * torch.eye(len(on), dtype=on.dtype), with_all + penalty)
    return a.float()


def spend(costs: Sequence[Sequence[float]], total: int, *, least: int) -> list[int]:
    """How many units each layer keeps, so that it is `total` in all and the cheapest are off.

    Starting from all, again and again the last unit of that layer goes whose last costs least.

    Args:
        costs: By layer, what it costs to do without the unit of each rank, best rank first.
        total: Units to keep, over all layers; no more than there are.
        least: Units that every layer keeps.

    Example (worked by hand): costs [[9, 5, 1], [8, 3, 2]] and a total of 4 take away those of 1
    and 2, which leaves 2 and 2; a total of 3 takes 3 too: 2 and 1.
    """
    kept = [len(of_layer) for of_layer in costs]
    while sum(kept) > total:
        layers = [layer for layer, units in enumerate(kept) if units > least]
        kept[min(layers, key=lambda layer: costs[layer][kept[layer] - 1])] -= 1
    return kept
