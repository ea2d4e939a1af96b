"""The loss of diffusion: worked by hand, against distributions written out, and its gradients."""

import math
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from headwise.models.dit.loss import diffusion_loss

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
SHAPE = (3, 2, 5, 5)
T = torch.tensor([1, 500, 999])


def schedule(**options: object) -> "diffusers.DDPMScheduler":
    return diffusers.DDPMScheduler(**options)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted noise, noise and images."""
    return tuple(torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))


def posterior(x_0, x_t, t, betas):
    """Mean and variance of q(x_{t-1} | x_t, x_0), a step at a time, in plain numbers."""
    before = math.prod(1 - b for b in betas[:t])
    now = before * (1 - betas[t])
    mean = x_0 * math.sqrt(before) * betas[t] / (1 - now)
    mean = mean + x_t * math.sqrt(1 - betas[t]) * (1 - before) / (1 - now)
    return mean, betas[t] * (1 - before) / (1 - now), now


def test_without_a_variance_it_is_the_squared_error():
    noise = torch.zeros(SHAPE)
    output = noise + torch.tensor([2.0, 1.0, -1.0]).view(3, 1, 1, 1)
    loss, simple, bound = diffusion_loss(output, noise, noise, T, schedule())
    assert (loss.item(), simple.tolist(), bound) == (2, [4, 1, 1], None)


def test_the_bound_by_hand():
    # Two steps of beta 1/2: alpha-bar 1/2 and 1/4. At t = 1 the variance of q is
    # 1/2 · (1/2) / (3/4) = 1/3, and v = -1 gives p the same: what is left is the distance,
    # c² = (1/4) / (1/2 · 3/4) = 2/3, and KL = 1/2 · 2/3 · 3 = 1 nat.
    two = schedule(trained_betas=[0.5, 0.5])
    noise = torch.zeros(1, 1, 1, 1)
    output = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    loss, simple, bound = diffusion_loss(output, noise, noise, torch.tensor([1]), two)
    assert_close(bound, torch.tensor([1 / math.log(2)]))
    assert_close(simple, torch.tensor([1.0]))
    assert_close(loss, simple[0] + 0.001 * 2 * bound[0])
    # v = 1 gives p the variance 1/2: KL = 1/2 (ln(3/2) + 2/3 - 1 + 2/3 · 2).
    output = torch.tensor([1.0, 1.0]).view(1, 2, 1, 1)
    bound = diffusion_loss(output, noise, noise, torch.tensor([1]), two).bound
    assert_close(bound, torch.tensor([(math.log(1.5) + 1) / 2 / math.log(2)]))


def test_the_bound_is_the_divergence_of_the_two_gaussians():
    predicted, noise, x_0 = inputs()
    v = torch.rand(SHAPE, dtype=torch.float64) * 2 - 1
    plan = schedule()
    betas = plan.betas.double().tolist()
    want = []
    for i, t in enumerate(T.tolist()):
        now = math.prod(1 - b for b in betas[: t + 1])
        x_t = math.sqrt(now) * x_0[i] + math.sqrt(1 - now) * noise[i]
        mean, variance, _ = posterior(x_0[i], x_t, t, betas)
        x_hat = (x_t - math.sqrt(1 - now) * predicted[i]) / math.sqrt(now)
        share = (v[i] + 1) / 2
        log_variance = share * math.log(betas[t]) + (1 - share) * math.log(variance)
        q = Normal(mean, torch.full_like(mean, math.sqrt(variance)))
        p = Normal(posterior(x_hat, x_t, t, betas)[0], (log_variance / 2).exp())
        want.append(kl_divergence(q, p).mean() / math.log(2))
    output = torch.cat([predicted, v], dim=1).requires_grad_()
    loss, simple, bound = diffusion_loss(output, noise, x_0, T, plan)
    assert_close(bound, torch.stack(want), rtol=1e-6, atol=0)
    assert_close(loss, (simple + bound).mean())
    # The error learns from the simple loss alone, the variance from the bound alone.
    (gradient,) = torch.autograd.grad(loss, output)
    (alone,) = torch.autograd.grad(diffusion_loss(output[:, :2], noise, x_0, T, plan).loss, output)
    assert_close(gradient[:, :2], alone[:, :2])
    assert gradient[:, 2:].all()


@pytest.mark.parametrize("x_0", [0.2, -1.0, 1.0])
@pytest.mark.parametrize("error", [0.0, 0.6, -3.0])
def test_the_first_step_is_the_likelihood_of_8_bits(x_0, error):
    plan = schedule()
    beta = plan.betas[0].double().item()
    shape, t = (1, 1, 1, 1), torch.tensor([0])
    noise = torch.full(shape, 0.3, dtype=torch.float64)
    image = torch.full(shape, x_0, dtype=torch.float64)
    output = torch.cat([noise + error, torch.ones_like(noise)], dim=1)
    bound = diffusion_loss(output, noise, image, t, plan).bound
    # v = 1: the variance is beta. The mean is what the predicted noise leaves of x_1.
    x_1 = math.sqrt(1 - beta) * x_0 + math.sqrt(beta) * 0.3
    mean = (x_1 - math.sqrt(beta) * (0.3 + error)) / math.sqrt(1 - beta)
    p = Normal(torch.tensor(mean, dtype=torch.float64), math.sqrt(beta))
    upper = 1.0 if x_0 == 1 else p.cdf(torch.tensor(x_0 + 1 / 255, dtype=torch.float64))
    lower = 0.0 if x_0 == -1 else p.cdf(torch.tensor(x_0 - 1 / 255, dtype=torch.float64))
    assert_close(bound, -torch.log2(torch.as_tensor(upper - lower)).view(1), rtol=1e-5, atol=1e-9)


def test_256_bins_make_a_whole():
    values = torch.arange(256, dtype=torch.float64).view(256, 1, 1, 1) / 127.5 - 1
    # Predicted noise that lets each value's mean be 0.4.
    beta = schedule().betas[0].double()
    error = (values - 0.4) * ((1 - beta) / beta).sqrt()
    output = torch.cat([error, torch.zeros_like(error)], dim=1)
    t = torch.zeros(256, dtype=torch.long)
    bound = diffusion_loss(output, torch.zeros_like(error), values, t, schedule()).bound
    assert_close(torch.exp2(-bound).sum().item(), 1.0)


@pytest.mark.parametrize("t", [0, 1, 999])
@pytest.mark.parametrize("x_0", [0.0, -1.0, 1.0])
def test_what_is_far_off_keeps_values_and_gradients_finite(t, x_0):
    v = torch.tensor([-5.0, -1.0, 1.0, 5.0, 300.0]).view(5, 1, 1, 1)
    image = torch.full_like(v, x_0)
    output = torch.cat([torch.full_like(v, 50.0), v], dim=1).requires_grad_()
    loss = diffusion_loss(output, torch.zeros_like(v), image, torch.full((5,), t), schedule()).loss
    (gradient,) = torch.autograd.grad(loss, output)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_images_do_not_depend_on_batch_mates():
    predicted, noise, x_0 = inputs()
    output, t = torch.cat([predicted, predicted.flip(0)], dim=1), torch.tensor([0, 3, 700])
    whole = diffusion_loss(output, noise, x_0, t, schedule())
    for i in range(3):
        one = slice(i, i + 1)
        alone = diffusion_loss(output[one], noise[one], x_0[one], t[one], schedule())
        assert_close((alone.simple, alone.bound), (whole.simple[one], whole.bound[one]))


IMAGE = torch.zeros(2, 3, 4, 4)
BAD = [
    ((IMAGE, IMAGE, IMAGE[:1], T[:2]), "noise and x_0 have shapes [2, 3, 4, 4], [1, 3, 4, 4]"),
    ((IMAGE[:, :2], IMAGE, IMAGE, T[:2]), "output has shape [2, 2, 4, 4]; it must be that of"),
    ((IMAGE, IMAGE, IMAGE, T), "t is [1, 500, 999]; it must hold 2 whole numbers in 0..999"),
    ((IMAGE, IMAGE, IMAGE, torch.tensor([0, 1000])), "whole numbers in 0..999"),
    ((IMAGE, IMAGE, IMAGE, torch.tensor([0.0, 1.0])), "whole numbers in 0..999"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_inputs_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        diffusion_loss(*given, schedule())


def test_only_noise_is_predicted():
    plan = schedule(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type 'v_prediction'; it must be 'epsilon'"):
        diffusion_loss(IMAGE, IMAGE, IMAGE, T[:2], plan)
