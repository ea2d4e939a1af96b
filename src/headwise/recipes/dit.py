"""Images from noise: diffusion transformers, and the same with routed heads (MoH-DiT)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from headwise.analysis.image_records import RoutedImage
from headwise.data.images import ImageSet, halve_images, load_images
from headwise.data.patches import in_floats
from headwise.hf import record_routing
from headwise.memory import check_memory
from headwise.models import DiT, DiTConfig
from headwise.parity import count_flops
from headwise.quality.features import ClassifierFeatures, collect_features
from headwise.recipes.classifier import load_classifier, train_classifier
from headwise.recipes.drawing import check_steps, draw_images, pipeline_of, schedule
from headwise.recipes.images import (
    ImageRun,
    ImageTask,
    LabelledImages,
    check_classes,
    class_fields,
    labels_of,
    only,
)
from headwise.recipes.vae import encoded, images_for, load_vae
from headwise.training.comparison import Scores, Variant
from headwise.training.evaluation import RoutingStatistics
from headwise.training.fields import check_at_least, check_batch_size, check_guidance
from headwise.training.pictures import routed_images, sample_grid

_AT_A_TIME = 100
# Classes, and images of each, that the page shows.
_ROWS, _COLUMNS = 10, 8
# What t a head's load is measured at: from the first steps of sampling to the last.
_TIMES = (900, 700, 500, 300, 100)


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(ImageRun):
    """DiT and MoH-DiT on images of classes: AdamW at a constant learning rate, averaged weights.

    What is saved, sampled from and measured are the averaged weights.

    **Source**: MoH, arXiv 2410.11842, section 4.2, in the manner of DiT, arXiv 2212.09748.
    **Deviates**: the same share of heads is on in every layer, as far as whole heads allow
    (presets "moh-dit-s-75" and its like have the published budgets); pixels where no VAE is given.

    Attributes:
        size: Sizes of the models: test, s, b, l or xl.
        vae: Directory or name of diffusers' AutoencoderKL, to whose latents all images are brought
            once; None trains on pixels.
        class_dropout: Share of labels that training leaves out, for guidance.
        averaging: Share that the averaged weights keep of themselves in a step, at most; at first
            it is less.
        guidance_scale: Of the samples that are measured, 0 or more; 1 is none.
        sampling_steps: Of DDIM, for each of these.
        samples: How many images of each class are measured.
        classifier: Directory of a classifier of these images (`headwise train vit` makes one),
            whose features FID and its like compare; None trains a small one first.
        learning_rate: Reached after warmup_steps, then constant.
    """

    sizes: ClassVar[dict[str, str]] = {
        name: f"dit-{name}" for name in ("test", "s", "b", "l", "xl")
    }
    dense_label = "DiT"
    routed_label = "MoH-DiT"

    output: Path = Path("runs/dit")
    vae: str | None = None
    class_dropout: float = 0.1
    averaging: float = 0.9999
    guidance_scale: float = 1.5
    sampling_steps: int = 50
    samples: int = 30
    classifier: Path | None = None
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("class_dropout", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1, below 1")
        if self.class_dropout == 0 and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; with class_dropout 0 it must be 1"
            )
        check_guidance(self.guidance_scale)
        for name in ("sampling_steps", "samples"):
            check_at_least(1, name, getattr(self, name))
        side = self.image_size or 1
        sizes = {"samples": self.samples, "image_size": self.image_size}
        check_memory(4 * self.samples * side**2, "the samples", **sizes)
        super().__post_init__()

    @property
    def final_learning_rate(self) -> float:
        """Constant, as in the paper."""
        return self.learning_rate

    def routed(self, active: float, **changes: Any) -> Variant:
        """Its routers start by Xavier, as in the released code: a deviation of 0 is none here."""
        return super().routed(active, **{"router_std": 0.0} | changes)

    @property
    def recipe(self) -> str:
        return "dit"

    @property
    def title(self) -> str:
        return "Diffusion transformers with all heads and with some"


def read(run: DiffusionRun) -> "DiffusionTask":
    """Load the images, encode them where a VAE is given, and find or train a classifier of them.

    What takes long, encoding and training, begins when all sizes are known to fit.

    Raises:
        ValueError: If images, VAE or classifier cannot be used, or the sizes do not fit them.
    """
    check_steps("sampling_steps", run.sampling_steps)
    training, held_out = load_images(run.data, image_size=run.image_size)
    check_classes(run.data, training)
    _check_measurable(run, training)
    check_batch_size(run.batch_size, len(training))
    parts: tuple[ImageSet, ...] = (training, *halve_images(held_out))
    vae = None
    if run.vae is not None:
        vae = load_vae(run.vae)
        parts = tuple(images_for(vae, run.vae, images) for images in parts)
    training, validation, test = parts
    classifier = None if run.classifier is None else load_classifier(run.classifier, training)
    of_one = (encoded(vae, training.take([0])),)
    task = DiffusionTask(run, training, validation, test, of_one, vae, classifier)
    task.check()
    return replace(
        task,
        values=tuple(encoded(vae, images) for images in parts),
        classifier=train_classifier(training) if classifier is None else classifier,
    )


def _check_measurable(run: DiffusionRun, images: ImageSet) -> None:
    """Refuse what `sample_quality` would refuse when all models are trained."""
    # torchmetrics is for those who draw.
    from headwise.quality.metrics import FEWEST

    drawn = run.samples * len(images.classes)
    if drawn < FEWEST:
        raise ValueError(
            f"samples is {run.samples}, which makes {drawn} images of {len(images.classes)} "
            f"classes; it takes {FEWEST} or more to measure them"
        )
    if len(images) < FEWEST or (images.pixels == images.pixels[0]).all():
        raise ValueError(
            f"data {run.data!r} has {len(images)} images to train on; to measure by them, there "
            f"must be {FEWEST} or more, and not all of them the same"
        )


@dataclass(frozen=True)
class DiffusionTask(ImageTask):
    """Images to learn to draw.

    Attributes:
        values: What the models learn to draw, of all three: pixels in -1..1, or latents.
        vae: Which made these latents, and makes images of them.
        classifier: Of the images.
    """

    run: DiffusionRun
    values: tuple[NDArray[np.float32], ...]
    vae: Any
    classifier: Any
    curve_images = 256
    loss_unit = "hybrid loss per image"

    @property
    def processor(self) -> Any:
        return schedule()

    def check(self) -> None:
        with torch.device("meta"):
            for variant in self.run.selected():
                DiT(self.config(variant))

    def model(self, variant: Variant, seed: int) -> DiT:
        torch.manual_seed(seed)
        return DiT(self.config(variant))

    def config(self, variant: Variant) -> DiTConfig:
        """Sizes of a variant."""
        _, channels, size, _ = self.values[0].shape
        if size % (patch := DiTConfig.preset(self.run.preset).patch_size):
            what = "images" if self.vae is None else "latents"
            raise ValueError(
                f"image_size is {self.run.image_size}, and {what} are {size} × {size}; patches of "
                f"{patch} × {patch} must divide them"
            )
        changes: dict[str, Any] = {
            "input_size": size,
            "in_channels": channels,
            **class_fields(self.training),
            "class_dropout": self.run.class_dropout,
        }
        if variant.attention is not None:
            changes["shared_heads"] = variant.attention.shared
            changes["active_heads"] = variant.attention.active
            changes["balance_coefficient"] = variant.attention.balance_coefficient
            changes["router_std"] = variant.attention.router_std or None
        return DiTConfig.preset(self.run.preset, **changes)

    def flops_by_module(self, model: DiT) -> dict[str, float]:
        patches = model.config.num_patches
        flops = count_flops(model, sequence_length=patches, causal=False)
        return {name: patches * cost for name, cost in flops.items()}

    def example(self, model: DiT) -> dict[str, Tensor]:
        x = torch.zeros(1, *self.values[0].shape[1:], device=model.device)
        zero = torch.zeros(1, dtype=torch.long, device=model.device)
        return {"x": x, "t": zero, "y": zero}

    def seen(self) -> Sequence[NDArray[Any]]:
        return self.values[:2]

    def trainer(self, **arguments: Any) -> Any:
        # diffusers is for those who draw.
        from headwise.training.diffusion import DiffusionTrainer

        run = self.run
        return DiffusionTrainer(
            schedule=schedule(), averaging=run.averaging, flip=run.flip, **arguments
        )

    def score(self, model: Any) -> Scores:
        """Images of each class, drawn and compared by the classifier with those trained on."""
        from headwise.quality.metrics import sample_quality

        model.eval()
        features = ClassifierFeatures(self.classifier.to(model.device), spatial="backbone.stages.0")
        shown: list[NDArray[np.uint8]] = []
        drawn = collect_features(self._drawn(model, shown), features)
        pixels = self.training.pixels
        parts = (pixels[i : i + _AT_A_TIME] for i in range(0, len(pixels), _AT_A_TIME))
        real = collect_features((in_floats(part).to(model.device) for part in parts), features)
        quality = sample_quality(real, drawn)
        wanted = torch.tensor(self._wanted(), device=drawn.logits.device)
        columns = {
            "recognised": 100 * (drawn.logits.argmax(1) == wanted).double().mean().item(),
            "fid": quality.fid,
            **({} if quality.sfid is None else {"sfid": quality.sfid}),
            "inception_score": quality.inception_score,
            "precision_of_samples": quality.precision,
            "recall_of_samples": quality.recall,
            "samples": quality.num_generated,
            "real_images": quality.num_real,
        }
        names = self.training.classes[:_ROWS]
        return Scores(
            columns,
            self._loads(model).head_loads(),
            None,
            texts=[],
            images=self._images(model),
            samples=sample_grid(np.concatenate(shown), names),
        )

    def _wanted(self) -> list[int]:
        """The classes that are drawn to be measured."""
        return [c for c in range(len(self.training.classes)) for _ in range(self.run.samples)]

    def _drawn(self, model: DiT, shown: list[NDArray[np.uint8]]) -> Iterator[Tensor]:
        """The images in parts; those that the page shows join `shown`."""
        pipeline = pipeline_of(model, "ddim", self.vae)
        pipeline.set_progress_bar_config(disable=True)
        classes, count, run = self._wanted(), self.run.samples, self.run
        seen = 0
        for pixels in draw_images(pipeline, classes, 0, run.guidance_scale, run.sampling_steps):
            places = range(seen, seen + len(pixels))
            shown.append(pixels[[i % count < _COLUMNS and classes[i] < _ROWS for i in places]])
            seen += len(pixels)
            yield in_floats(pixels).to(model.device)

    @torch.no_grad()
    def _loads(self, model: DiT) -> RoutingStatistics:
        """Who works for which class, on images of the test half made noisy."""
        statistics, generator = RoutingStatistics(model), torch.Generator().manual_seed(0)
        everything = LabelledImages(self.values[2], labels_of(self.test), np.arange(len(self.test)))
        with record_routing(model) as routings:
            for part, batch in enumerate(DataLoader(everything, batch_size=_AT_A_TIME)):
                x, y = batch["pixel_values"], batch["labels"]
                images = range(part * _AT_A_TIME, part * _AT_A_TIME + len(y))
                for time in _TIMES:
                    _see(model, x, y, time, generator)
                    for label in y.unique().tolist():
                        of_class = only(routings, (y == label).to(model.device))
                        statistics.add(self.training.classes[label], of_class, images)
        return statistics

    def _images(self, model: DiT) -> list[RoutedImage]:
        """Images of the test half, of which the model sees what is left late in sampling."""
        labels = labels_of(self.test)

        def see(picks: list[int]) -> None:
            x, y = (torch.from_numpy(values[picks]) for values in (self.values[2], labels))
            _see(model, x, y, _TIMES[-1], torch.Generator().manual_seed(0))

        return routed_images(model, self.test, labels, see)

    def facts(self) -> dict[str, str]:
        size = self.training.pixels.shape[-1]
        of = "pixels" if self.vae is None else f"pixels, as latents of {self.run.vae}"
        return {
            "Images": self.run.data or "scikit-learn's handwritten digits",
            "Of": f"{len(self.training.classes)} classes, {size} × {size} {of}",
            "Number": f"{len(self.training)} to train on; held out: {len(self.validation)} for the "
            f"validation curve, {len(self.test)} for the heads",
            "Samples": f"{self.run.samples} of each class, DDIM in {self.run.sampling_steps} "
            f"steps, guidance {self.run.guidance_scale:g}, compared with the images to train on",
            "Heads": f"on held-out images at t = {', '.join(map(str, _TIMES))}; maps of patches at "
            f"t = {_TIMES[-1]}",
        }


def _see(model: DiT, x: Tensor, y: Tensor, time: int, generator: torch.Generator) -> None:
    """Let the model see images of classes as noisy as they are at that time."""
    t = torch.full_like(y, time)
    noise = torch.randn(x.shape, generator=generator)
    seen = (schedule().add_noise(x, noise, t), t, y)
    model(*(value.to(model.device) for value in seen))
