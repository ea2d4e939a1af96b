"""What a diffusion model is trained on: its error in the noise, and a bound on its likelihood."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.special import log_ndtr

# Weight of the bound summed over all steps: lambda of improved DDPM.
_BOUND_WEIGHT = 0.001
# Half the distance of two values of 8 bits in -1..1.
_HALF_BIN = 1 / 255
# Beyond it lies the bin of -1, or of 1.
_OUTER = 0.999


class DiffusionLoss(NamedTuple):
    """What `diffusion_loss` returns.

    Attributes:
        loss: What is trained: the mean over the batch, a scalar.
        simple: Mean squared error of the noise, [B].
        bound: The step's term of the variational bound, in bits per value, [B]; its gradient
            reaches the variance only. None where no variance is learned.
    """

    loss: Tensor
    simple: Tensor
    bound: Tensor | None


def diffusion_loss(
    output: Tensor, noise: Tensor, x_0: Tensor, t: Tensor, schedule: Any
) -> DiffusionLoss:
    """The hybrid loss of a model that predicts noise, and its variance if it has the channels.

        x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε          what the model saw: `schedule.add_noise(x_0, ε, t)`
        simple = mean (ε̂ - ε)²
        bound = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  at t = 0  -log p(x_0 | x_1)
        loss = mean over the batch of simple + 0.001 · steps · bound

    The means of q and p differ by c (ε̂ - ε), c = β_t / √(α_t (1-ᾱ_t)); x_t itself cancels. With
    v the other half of the output, ν = (v + 1)/2, β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t), the variance
    of p is exp(ν log β_t + (1-ν) log β̃_t); β̃_0, which is 0, counts as β̃_1. p(x_0 | x_1) is the
    share of the Gaussian in the bin of 1/127.5 around x_0; outer bins reach to infinity.

    **Source**: improved DDPM, arXiv 2102.09672, Eq. 4 to 6, 15 and 16, as DiT, arXiv 2212.09748,
    trains it: with its 1000 steps the bound has weight 1.
    **Deviates**: nothing; in units, the bound is in bits (as in the released code).

    Args:
        output: Of the model, [B, C, H, W], or [B, 2·C, H, W] with a learned variance.
        noise: ε, [B, C, H, W].
        x_0: Images or latents, [B, C, H, W]; -1..1 is 8 bits.
        t: Whole timesteps, [B], from 0.
        schedule: A scheduler of diffusers with linear or other `betas`, such as DDPMScheduler().

    Raises:
        ValueError: If shapes do not fit, or the schedule is for another prediction than of noise.

    Example (worked by hand): ε̂ - ε = 2 everywhere and no variance: simple = loss = 4.
    """
    _check(output, noise, x_0, t, schedule)
    predicted, variance = output.to(torch.promote_types(output.dtype, torch.float32)), None
    if output.shape[1] == 2 * noise.shape[1]:
        predicted, variance = predicted.chunk(2, dim=1)
    error = predicted - noise
    simple = error.square().flatten(1).mean(1)
    if variance is None:
        return DiffusionLoss(simple.mean(), simple, None)
    bound = _bound(error.detach(), variance, x_0, t, schedule.betas)
    weight = _BOUND_WEIGHT * len(schedule.betas)
    return DiffusionLoss((simple + weight * bound).mean(), simple, bound)


def _bound(error: Tensor, v: Tensor, x_0: Tensor, t: Tensor, betas: Tensor) -> Tensor:
    """In bits per value, [B]."""
    # In float32, 1 - ᾱ would lose most of its digits at the first steps.
    betas = betas.to(t.device, torch.float64)
    alphas = 1 - betas
    seen = 1 - alphas.cumprod(0)
    smallest = betas[1:] * seen[:-1] / seen[1:]
    smallest = torch.cat([smallest[:1], smallest])

    def at_t(values: Tensor) -> Tensor:
        return values[t].to(error.dtype).view(-1, 1, 1, 1)

    high, low = at_t(betas.log()), at_t(smallest.log())
    log_variance = low + (v + 1) / 2 * (high - low)
    distance = at_t(betas / (alphas * seen).sqrt()) * error
    divergence = 0.5 * (
        log_variance - low - 1 + (low - log_variance).exp()
        + distance.square() * (-log_variance).exp()
    )  # fmt: skip
    first = -_log_probability(x_0, distance, (-0.5 * log_variance).exp())
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, first, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _log_probability(x_0: Tensor, distance: Tensor, inverse_std: Tensor) -> Tensor:
    """Of the bin of x_0 under a Gaussian whose mean lies `distance` below x_0."""
    # A Gaussian is even: on its lower side, what lies below a bin's ends is not rounded to 1.
    below = -distance.abs()
    upper = log_ndtr(inverse_std * (below + _HALF_BIN))
    lower = log_ndtr(inverse_std * (below - _HALF_BIN))
    share = -torch.expm1(lower - upper)
    inside = upper + share.clamp_min(torch.finfo(share.dtype).tiny).log()
    lowest = log_ndtr(inverse_std * (_HALF_BIN + distance))
    highest = log_ndtr(inverse_std * (_HALF_BIN - distance))
    return torch.where(x_0 < -_OUTER, lowest, torch.where(x_0 > _OUTER, highest, inside))


def _check(output: Tensor, noise: Tensor, x_0: Tensor, t: Tensor, schedule: Any) -> None:
    if noise.shape != x_0.shape or noise.ndim != 4:
        raise ValueError(
            f"noise and x_0 have shapes {list(noise.shape)}, {list(x_0.shape)}; both must be "
            "[B, C, H, W]"
        )
    batch, channels, *size = noise.shape
    if list(output.shape) not in ([batch, c, *size] for c in (channels, 2 * channels)):
        raise ValueError(
            f"output has shape {list(output.shape)}; it must be that of noise, "
            f"{list(noise.shape)}, or have twice its channels"
        )
    steps = len(schedule.betas)
    if t.shape != (batch,) or t.is_floating_point() or bool(((t < 0) | (t >= steps)).any()):
        raise ValueError(f"t is {t.tolist()}; it must hold {batch} whole numbers in 0..{steps - 1}")
    if (kind := schedule.config.prediction_type) != "epsilon":
        raise ValueError(f"schedule has prediction_type {kind!r}; it must be 'epsilon'")
