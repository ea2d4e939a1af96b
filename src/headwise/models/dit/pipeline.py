"""Images of given classes from a `DiT`, by diffusers' schedulers. Needs the extra "diffusion"."""

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headwise.models.dit.model import DiT
from headwise.ops.choice import check_choice

try:
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        ImagePipelineOutput,
        SchedulerMixin,
    )
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise ValueError(
        "sampling needs diffusers, which is not installed; the extra diffusion has it: "
        "`pip install 'headwise[diffusion]'`"
    ) from None

OutputType = Literal["pil", "np", "pt", "latent"]
_GUIDED = 3  # channels, as the model was published
OnStepEnd = Callable[["RoutedDiTPipeline", int, Any, dict[str, Any]], dict[str, Any] | None]


class RoutedDiTPipeline(DiffusionPipeline):
    """Samples from a `DiT`: noise becomes images, or latents that a VAE decodes.

    **Source**: DiT, arXiv 2212.09748, with classifier-free guidance as in its released code.
    **Deviates** from diffusers' DiTPipeline: any number of classes; guidance on the first three
    channels by default, as the model was published; a DDPMScheduler with a learned variance gets
    it. Other schedulers get the noise only, as there.

    What `save_pretrained` wrote, `RoutedDiTPipeline.from_pretrained` loads. diffusers'
    DiffusionPipeline.from_pretrained looks for classes in diffusers alone and ends with "module
    diffusers has no attribute RoutedDiTPipeline", unless told that our code may run: with
    custom_pipeline=headwise.models.dit.pipeline.__file__ and trust_remote_code=True.

    Args:
        transformer: The model, in eval mode.
        scheduler: DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or another of
            diffusers; it must take predicted noise. Its clip_sample and thresholding may be on for
            pixels; for latents they must be off.
        vae: Decodes what is sampled; None where the model was trained on pixels in -1..1.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    transformer: DiT
    scheduler: Any
    vae: Any

    def __init__(
        self, transformer: DiT, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        classes: Sequence[int],
        *,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = _GUIDED,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        output_type: OutputType = "pil",
    ) -> ImagePipelineOutput:
        """An image of each of the classes.

        Args:
            classes: 0..num_labels - 1, one for each image.
            guidance_scale: 1 is no guidance, 0 samples without a class.
            guidance_channels: How many channels of the noise are guided, 1 to in_channels; None for
                all. The default guides all where there are fewer.
            num_inference_steps: Steps of the scheduler.
            generator: Draws all noise; or one for each image. Default: torch's own.
            seeds: Instead of a generator, a seed for each image, which is then the same whatever
                else is in the batch and on whatever device.
            callback_on_step_end: Called with the pipeline, the step, its time and
                {"latents": tensor}; what it returns under that name goes on.
            output_type: "pil" images, or values in 0..1 as "np" [B, H, W, C] or "pt" [B, C, H, W];
                "latent" is what was sampled, as it is.

        Returns:
            An output with `images`.

        Raises:
            ValueError: If the model is in training mode, a class is out of range, guidance is asked
                of a model without a null class or of channels that it has not, seeds and a
                generator are both given or too few, or the scheduler, the VAE or the output type do
                not suit the model.
        """
        self._check(classes, num_inference_steps, generator, seeds, output_type)
        self._check_guidance(guidance_scale, guidance_channels)
        config, device = self.transformer.config, self._execution_device
        if seeds is not None:
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = randn_tensor(
            (len(classes), config.in_channels, config.input_size, config.input_size),
            generator=generator, device=device, dtype=torch.float32,
        )  # fmt: skip
        y = torch.tensor(classes, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        # Where DDIM clips what it takes for the image, the noise must be what is left: guidance
        # goes far beyond -1..1, and the rest of it would pile up.
        known = {"generator": generator, "use_clipped_model_output": True}
        taken = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in known.items() if name in taken}
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x = self.scheduler.scale_model_input(latents, t)
            output = self._predict(x, t, y, guidance_scale, guidance_channels)
            latents = self.scheduler.step(output, t, latents, **options).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, t, {"latents": latents}) or {}
                latents = changed.get("latents", latents)
        images = latents if output_type == "latent" else self._decode(latents)
        self.maybe_free_model_hooks()
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images)

    def _predict(self, x: Tensor, t: Any, y: Tensor, scale: float, channels: int | None) -> Tensor:
        """The noise, and its variance where the scheduler takes it."""
        model, config = self.transformer, self.transformer.config
        if scale == 1:
            output = model(x, torch.as_tensor(t, device=x.device).expand(len(x)), y)
        else:
            output = model.forward_with_cfg(
                x.repeat(2, 1, 1, 1),
                torch.as_tensor(t, device=x.device).expand(2 * len(x)),
                torch.cat([y, torch.full_like(y, config.num_labels)]),
                scale,
                channels,
            )[: len(x)]
        return (
            output.float() if self._learns_variance() else output[:, : config.in_channels].float()
        )

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def _learns_variance(self) -> bool:
        return self.scheduler.config.get("variance_type") == "learned_range"

    def _check(
        self,
        classes: Sequence[int],
        num_inference_steps: int,
        generator: Any,
        seeds: Sequence[int] | None,
        output_type: str,
    ) -> None:
        config = self.transformer.config
        if self.transformer.training:
            raise ValueError("transformer is in training mode, where it drops classes; call eval()")
        known = range(config.num_labels)
        is_list = isinstance(classes, Sequence) or getattr(classes, "ndim", 0) == 1
        given = list(classes) if is_list else []
        if not given or not all(isinstance(x, Integral) and x in known for x in given):
            raise ValueError(
                f"classes is {given or classes!r}; it must be a list, one for each image, in "
                f"0..{config.num_labels - 1}"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        if seeds is not None and (generator is not None or len(seeds) != len(classes)):
            raise ValueError(
                f"seeds is {list(seeds)}; there must be one for each of the {len(classes)} images, "
                "and no generator"
            )
        if isinstance(generator, list) and len(generator) != len(classes):
            raise ValueError(
                f"generator has {len(generator)} entries; there must be one for each of the "
                f"{len(classes)} images, or one for all"
            )
        check_choice("output_type", output_type, OutputType)
        self._check_scheduler()
        if self.vae is not None and self.vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"vae decodes {self.vae.config.latent_channels} channels; the transformer draws "
                f"{config.in_channels}, so it was trained with another, or with none"
            )
        channels = config.in_channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(
                f"output_type is 'pil', but what is sampled has {channels} channels; give a vae, "
                "or take 'pt'"
            )

    def _check_guidance(self, scale: float, channels: int | None) -> None:
        config = self.transformer.config
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale is {scale}; it must be finite")
        if scale != 1 and config.class_dropout == 0:
            raise ValueError(
                f"guidance_scale is {scale}; a model trained with class_dropout 0 has no null "
                "class, so it must be 1"
            )
        if channels in (None, _GUIDED):
            return
        if not isinstance(channels, Integral) or not 1 <= channels <= config.in_channels:
            raise ValueError(
                f"guidance_channels is {channels!r}; it must lie in 1..{config.in_channels} "
                "(in_channels), or be None for all"
            )

    def _check_scheduler(self) -> None:
        config, options = self.transformer.config, self.scheduler.config
        if (kind := options.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(
                f"scheduler has prediction_type {kind!r}; a DiT predicts noise, so it must be "
                "'epsilon'"
            )
        clips = [name for name in ("clip_sample", "thresholding") if options.get(name)]
        if clips and self.vae is not None:
            raise ValueError(
                f"scheduler has {clips[0]} on, which keeps samples in -1..1; with a vae they are "
                "latents, which lie anywhere, so it must be False"
            )
        variance = options.get("variance_type") or "fixed"
        suits = isinstance(self.scheduler, DDPMScheduler) and config.learn_sigma
        if variance.startswith("learned") and not (suits and self._learns_variance()):
            raise ValueError(
                f"scheduler is a {type(self.scheduler).__name__} with variance_type {variance!r}; "
                "only a DDPMScheduler takes the variance that a DiT with learn_sigma learns, as "
                "'learned_range'; else it must be None, or 'fixed_small' for DDPM"
            )
