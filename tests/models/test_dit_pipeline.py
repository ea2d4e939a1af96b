"""Sampling from a DiT: one step by hand, guidance, seeds, schedulers, a VAE, saved and refused."""

import importlib
import math
import re
import sys

import numpy as np
import pytest
import torch
from test_dit import tiny
from torch.testing import assert_close

from headwise import record_routing

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from headwise.models.dit import pipeline as dit_pipeline  # noqa: E402
from headwise.models.dit.pipeline import RoutedDiTPipeline  # noqa: E402

# diffusers makes numpy arrays of torch's tensors in a way that numpy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES, CHANNELS, SIDE = 7, 4, 6
SCHEDULERS = {
    "DDPM": lambda: diffusers.DDPMScheduler(),
    "DDPM, learned": lambda: diffusers.DDPMScheduler(variance_type="learned_range"),
    "DDIM": lambda: diffusers.DDIMScheduler(),
    "DDIM, of latents": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPM-Solver++, SDE": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++"
    ),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
}


def pipeline(
    scheduler: str = "DDIM", channels: int = CHANNELS, **changes: object
) -> RoutedDiTPipeline:
    sizes = {
        "in_channels": channels, "num_labels": CLASSES, "num_hidden_layers": 2,
        "num_heads": [2, 5], "shared_heads": [2, 2], "active_heads": [2, 4],
    }  # fmt: skip
    pipe = RoutedDiTPipeline(tiny(**sizes | changes), SCHEDULERS[scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: RoutedDiTPipeline, **options: object) -> torch.Tensor:
    given = {"classes": [1, 6, 0], "seeds": [11, 12, 13], "num_inference_steps": 4}
    return pipe(**given | {"output_type": "latent"} | options).images


def first_noise(count: int, seed: int = 11) -> torch.Tensor:
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return torch.cat([torch.randn(1, CHANNELS, SIDE, SIDE, generator=g) for g in generators])


@pytest.mark.parametrize(("channels", "count"), [(3, 3), (None, 4)])
def test_a_step_by_hand(channels, count):
    pipe = pipeline()
    x, y, t = first_noise(2), torch.tensor([1, 6]), torch.tensor([0, 0])
    model = pipe.transformer
    # The one step of the schedule is that of time 0.
    of_class, of_null = model(x, t, y), model(x, t, torch.full_like(y, CLASSES))
    noise = of_class[:, :CHANNELS].clone()
    noise[:, :count] = (of_null + 2.5 * (of_class - of_null))[:, :count]
    seen = 1 - pipe.scheduler.betas[0]
    want = ((x - (1 - seen).sqrt() * noise) / seen.sqrt()).clamp(-1, 1)
    got = sample(
        pipe, classes=[1, 6], seeds=[11, 12], num_inference_steps=1, guidance_scale=2.5,
        guidance_channels=channels,
    )  # fmt: skip
    assert_close(got, want)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_seed_gives_an_image_whatever_else_is_in_the_batch(scheduler):
    pipe = pipeline(scheduler)
    images = sample(pipe)
    assert images.isfinite().all()
    assert torch.equal(sample(pipe), images)
    assert_close(sample(pipe, classes=[6], seeds=[12]), images[1:2], rtol=1e-3, atol=1e-4)
    others = sample(pipe, seeds=[11, 22, 13])
    assert_close(others[[0, 2]], images[[0, 2]], rtol=1e-3, atol=1e-4)
    assert not torch.isclose(others[1], images[1]).all()


def test_a_generator_draws_all_noise():
    pipe = pipeline("DDPM")
    draw = [sample(pipe, seeds=None, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    torch.manual_seed(5)
    assert torch.equal(sample(pipe, seeds=None), draw[0])


def test_a_learned_variance_is_used_by_the_scheduler_that_takes_it():
    fixed, learned = sample(pipeline("DDPM")), sample(pipeline("DDPM, learned"))
    assert not torch.isclose(fixed, learned).all()
    pipe = pipeline("DDPM, learned")
    with torch.no_grad():
        # v = -1 everywhere is the variance that is fixed otherwise.
        final = pipe.transformer.final_layer.linear
        weight, bias = (p.view(4, 2 * CHANNELS, -1) for p in final.parameters())
        weight[:, CHANNELS:], bias[:, CHANNELS:] = 0, -1
    assert_close(sample(pipe), fixed)


def test_without_guidance_the_null_class_is_not_asked():
    pipe, rows = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    sample(pipe, guidance_scale=1)
    sample(pipe, guidance_scale=0)
    assert rows == [3] * 4 + [6] * 4
    # Scale 0 is the null class alone, whatever the class.
    again = sample(pipe, guidance_scale=0, guidance_channels=None, classes=[2, 2, 2])
    assert_close(sample(pipe, guidance_scale=0, guidance_channels=None), again)


def test_callbacks_see_each_step_and_may_change_it():
    pipe, seen = pipeline(), []

    def keep(this, step, t, tensors):
        assert this is pipe
        seen.append((step, int(t), tensors["latents"].clone()))

    images = sample(pipe, callback_on_step_end=keep)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], images)

    def clear(_, step, __, tensors):
        return {"latents": tensors["latents"] * (step < 3)}

    changed = sample(pipe, callback_on_step_end=clear)
    assert not changed.any()


def test_routings_are_recorded_while_sampling():
    pipe = pipeline()
    with record_routing(pipe.transformer) as routings:
        sample(pipe)
    assert [r.weights.shape for r in routings.values()] == [(6, 9, 2), (6, 9, 5)]


def test_a_vae_decodes_what_is_sampled(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=2 * SIDE, scaling_factor=0.5,
    ).eval()  # fmt: skip
    plain = pipeline("DDIM, of latents")
    pipe = RoutedDiTPipeline(plain.transformer, plain.scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    images = sample(pipe, output_type="pt")
    with torch.no_grad():
        want = vae.decode(sample(plain) / 0.5).sample
    assert_close(images, (want / 2 + 0.5).clamp(0, 1))
    pictures = sample(pipe, output_type="pil")
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (12, 12))] * 3
    picture = torch.from_numpy(np.asarray(pictures[1]) / 255).permute(2, 0, 1).float()
    assert_close(picture, images[1], atol=0.51 / 255, rtol=0)
    pipe.save_pretrained(tmp_path)
    again = RoutedDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, output_type="pt"), images)
    for scheduler, option in (("DDIM", "clip_sample"), ("DDPM", "clip_sample")):
        again.scheduler = SCHEDULERS[scheduler]()
        with pytest.raises(ValueError, match=rf"scheduler has {option} on.* it must be False"):
            sample(again)
    again.scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True)
    with pytest.raises(ValueError, match="scheduler has thresholding on, which keeps samples in"):
        sample(again)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_need_no_vae(channels, mode):
    pipe = pipeline(channels=channels)
    images = sample(pipe, output_type="np")
    assert images.shape == (3, SIDE, SIDE, channels)
    assert 0 <= images.min() < images.max() <= 1
    (picture, *_) = sample(pipe, output_type="pil")
    assert (picture.mode, picture.size) == (mode, (SIDE, SIDE))


@pytest.mark.parametrize("scheduler", ["DDPM, learned", "DPM-Solver++"])
def test_it_saves_and_loads(scheduler, tmp_path):
    pipe = pipeline(scheduler)
    pipe.save_pretrained(tmp_path)
    again = RoutedDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert again.vae is None
    assert torch.equal(sample(again), sample(pipe))


def test_diffusers_generic_class_takes_it_for_no_other_and_loads_it_when_trusted(
    tmp_path, monkeypatch
):
    # Where diffusers copies code that it trusts.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    load = diffusers.DiffusionPipeline.from_pretrained
    with pytest.raises(AttributeError, match="diffusers has no attribute RoutedDiTPipeline"):
        load(tmp_path)
    again = load(tmp_path, custom_pipeline=dit_pipeline.__file__, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "RoutedDiTPipeline"
    assert torch.equal(sample(again), sample(pipe))


def test_a_bfloat16_model_is_sampled_in_float32():
    pipe = pipeline()
    want = sample(pipe)
    pipe.transformer.bfloat16()
    images = sample(pipe)
    assert images.dtype == torch.float32
    assert (images - want).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": [1, 7, 0]}, "[1, 7, 0]; it must be a list, one for each image, in 0..6"),
        ({"classes": []}, "classes is []"),
        ({"classes": [1, 2.0, 0]}, "classes is [1, 2.0, 0]; it must be a list, one for each"),
        ({"classes": 3}, "classes is 3; it must be a list, one for each image, in 0..6"),
        ({"classes": torch.tensor(3)}, "classes is tensor(3); it must be a list"),
        ({"guidance_channels": 0}, "guidance_channels is 0; it must lie in 1..4 (in_channels), or"),
        ({"guidance_channels": -1}, "guidance_channels is -1; it must lie in 1..4"),
        ({"guidance_channels": 5}, "guidance_channels is 5; it must lie in 1..4"),
        ({"guidance_channels": 1.5}, "guidance_channels is 1.5; it must lie in 1..4"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; it must be finite"),
        (
            {"seeds": None, "generator": [torch.Generator()] * 2},
            "generator has 2 entries; there must",
        ),
        ({"seeds": [1, 2]}, "seeds is [1, 2]; there must be one for each of the 3 images"),
        ({"generator": torch.Generator()}, "and no generator"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; it must be one of 'pil'"),
        ({"output_type": "pil"}, "output_type is 'pil', but what is sampled has 4 channels"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(pipeline(), **options)


def test_models_and_schedulers_that_do_not_suit_are_refused():
    pipe = pipeline()
    pipe.transformer.train()
    with pytest.raises(
        ValueError, match=r"in training mode, where it drops classes; call eval\(\)"
    ):
        sample(pipe)
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0; .* it must be 1"):
        sample(pipeline(class_dropout=0))
    assert sample(pipeline(class_dropout=0), guidance_scale=1).isfinite().all()
    pipe = pipeline("DDPM, learned", learn_sigma=False)
    with pytest.raises(ValueError, match="variance_type 'learned_range'; only a DDPMScheduler"):
        sample(pipe)
    pipe = pipeline("DDPM, learned")
    solver = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    with pytest.raises(
        ValueError, match="scheduler is a DPMSolverMultistepScheduler with variance"
    ):
        sample(pipe)
    pipe.scheduler = solver.from_config(pipe.scheduler.config, variance_type=None)
    assert sample(pipe).isfinite().all()
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type 'v_prediction'; a DiT predicts noise"):
        sample(pipe)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "headwise.models.dit.pipeline")
    with pytest.raises(ValueError, match=r"needs diffusers.*pip install 'headwise\[diffusion\]'"):
        importlib.import_module("headwise.models.dit.pipeline")


def test_what_ddim_clips_leaves_no_noise_behind():
    pipe, latents = pipeline(), [first_noise(3)]
    pipe.scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True)

    def keep(_pipe, _step, _time, values):
        latents.append(values["latents"].double())

    sample(pipe, guidance_scale=30.0, callback_on_step_end=keep)
    shares = pipe.scheduler.alphas_cumprod.double()[pipe.scheduler.timesteps].tolist()
    for x, later, a, b in zip(latents, latents[1:], shares, [*shares[1:], 1.0], strict=False):
        # Both are √share · image + √(1 - share) · noise, of one image and one noise.
        image = (x * (1 - b) ** 0.5 - later * (1 - a) ** 0.5) / (
            (a * (1 - b)) ** 0.5 - (b * (1 - a)) ** 0.5
        )
        assert 0.99 < image.abs().max() < 1.001


def test_guidance_of_three_channels_is_of_all_where_there_are_fewer():
    few, many = pipeline(channels=1), pipeline()
    assert torch.equal(sample(few), sample(few, guidance_channels=None))
    assert not torch.equal(sample(many), sample(many, guidance_channels=None))
    with pytest.raises(ValueError, match=r"guidance_channels is 2; it must lie in 1\.\.1"):
        sample(few, guidance_channels=2)
