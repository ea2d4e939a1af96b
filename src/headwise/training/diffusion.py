"""Training a diffusion model: its loss, and the running average of its weights that is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from headwise.hf.recorder import collect_routings
from headwise.models.dit.loss import diffusion_loss
from headwise.ops import Routing
from headwise.training.trainer import SafeTrainer

_AVERAGE = "average.safetensors"
_EVALUATION_SEED = 0


class DiffusionTrainer(SafeTrainer):
    """Trains on noisy images; when training ends, the model has its averaged weights.

    The loss of a batch {"pixel_values": x_0, "labels": y}, with t and noise drawn anew, is
    `diffusion_loss`, and the model's routing loss. On what is held out, t and noise are the same
    always.

    Args:
        schedule: A scheduler of diffusers, whose `betas` and `add_noise` make images noisy.
        averaging: Share that the average keeps of itself in a step, at most.
        flip: Probability that an image is mirrored.
    """

    def __init__(self, *args: Any, schedule: Any, averaging: float, flip: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        from diffusers.training_utils import EMAModel

        # Of a batch, not of the model's arguments: what tells Trainer that there is a loss.
        self.label_names = ["labels"]
        self.schedule, self.flip = schedule, flip
        self.average = EMAModel(self.model.parameters(), decay=averaging)
        self.average.to(self.args.device)
        self.add_callback(_Averaging(self))

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """As `SafeTrainer`'s; then the model has the averaged weights."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint)
        self.average.copy_to(self.model.parameters())
        return output

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """The averaged ones."""
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self.average.restore(self.model.parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        shadows = load_file(Path(resume_from_checkpoint) / _AVERAGE)
        steps = shadows.pop("steps")
        self.average.optimization_step = int(steps)
        self.average.shadow_params = [
            shadows[str(i)].to(self.args.device) for i in range(len(shadows))
        ]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Of images or latents and their classes."""
        x, y = inputs["pixel_values"], inputs["labels"]
        generator = None if model.training else torch.Generator().manual_seed(_EVALUATION_SEED)
        if model.training and self.flip:
            mirrored = torch.rand(len(x), device=x.device) < self.flip
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        t = torch.randint(len(self.schedule.betas), y.shape, generator=generator).to(x.device)
        routings: dict[str, Routing] = {}
        with collect_routings(model, routings):
            output = model(self.schedule.add_noise(x, noise, t), t, y)
        loss = diffusion_loss(output, noise, x, t, self.schedule).loss
        if model.training:
            loss = loss + self.accelerator.unwrap_model(model).routing_loss(routings)
        return (loss, {"output": output}) if return_outputs else loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            shadows = {str(i): x.contiguous() for i, x in enumerate(self.average.shadow_params)}
            shadows["steps"] = torch.tensor(self.average.optimization_step)
            save_file(shadows, Path(output_dir) / _AVERAGE)


class _Averaging(TrainerCallback):
    """After each step, the average moves towards the weights."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.average.step(self.trainer.model.parameters())
