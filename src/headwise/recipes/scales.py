"""Runs of the papers' studies, at a scale: minutes here, an hour on a GPU, or as published."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from headwise.ops.choice import check_choice
from headwise.recipes import dit, text, vit
from headwise.recipes.decoders import TextRun
from headwise.recipes.dit import DiffusionRun
from headwise.recipes.studies import STUDIES, Study
from headwise.recipes.vit import VisionRun
from headwise.training.comparison import ComparisonRun, Protocol, Task, Variant

Scale = Literal["tiny", "small", "paper"]


@dataclass(frozen=True, kw_only=True)
class StudyRun(ComparisonRun):
    """A study at a scale. The scale says what the other fields default to.

    Attributes:
        study: Which one.
        scale: The one whose sizes and steps the fields had, before any was given.
    """

    protocol: Protocol = "fair"
    study: Annotated[str, tyro.conf.Suppress]
    scale: Annotated[Scale, tyro.conf.Suppress] = "tiny"

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, Scale)
        if self.study not in STUDIES:
            raise ValueError(f"study is {self.study!r}; it must be one of {', '.join(STUDIES)}")
        super().__post_init__()

    @property
    def recipe(self) -> str:
        return self.study

    @property
    def title(self) -> str:
        return f"{self.study}: {self._study.question}"

    @property
    def _study(self) -> Study:
        return STUDIES[self.study]

    @property
    def axis(self) -> str | None:
        return self._study.axis

    def variants(self) -> list[Variant]:
        return list(self._study.variants(self))

    def cost_of(self) -> Variant | None:
        return super().cost_of() if self._study.equal_cost else None


@dataclass(frozen=True, kw_only=True)
class TextStudyRun(StudyRun, TextRun):
    """A study on text at a scale. The scale says what the other fields default to."""


@dataclass(frozen=True, kw_only=True)
class VisionStudyRun(StudyRun, VisionRun):
    """A study of classifiers of images. The scale says what the other fields default to."""

    active_heads: Annotated[float, tyro.conf.Suppress] = 0.75


@dataclass(frozen=True, kw_only=True)
class DiffusionStudyRun(StudyRun, DiffusionRun):
    """A study of models that draw. The scale says what the other fields default to."""

    active_heads: Annotated[float, tyro.conf.Suppress] = 0.75


def read(run: TextStudyRun | VisionStudyRun | DiffusionStudyRun) -> Task:
    """The data of the study's subject, made ready.

    Raises:
        ValueError: If they cannot be used.
    """
    if isinstance(run, VisionStudyRun):
        return vit.read(run)
    return dit.read(run) if isinstance(run, DiffusionStudyRun) else text.read(run)


_RUNS: dict[str, type[StudyRun]] = {
    "text": TextStudyRun,
    "vit": VisionStudyRun,
    "dit": DiffusionStudyRun,
}
_TINY: dict[str, dict[str, Any]] = {
    "text": {
        "dim": 96,
        "mlp_dim": 256,
        "vocab_size": 2048,
        "sequence_length": 128,
        "steps": 1200,
        "learning_rate": 6e-3,
        "warmup_steps": 100,
        "eval_every": 200,
        "save_every": 200,
    },
    "vit": vars(VisionRun()),
    "dit": vars(DiffusionRun()),
}
# What a study needs beside the models.
_OF_STUDIES: dict[str, dict[str, Any]] = {"noise": {"typos": (0.01, 0.05, 0.1)}}
# Heads whose width 3 divides.
_OF_SMALL: dict[str, dict[str, Any]] = {"moh-heads-of-two-widths": {"num_heads": 8}}
_SMALL: dict[str, dict[str, Any]] = {
    "text": {
        "dim": 384,
        "num_layers": 8,
        "num_heads": 12,
        "mlp_dim": 1024,
        "vocab_size": 8192,
        "sequence_length": 512,
        "batch_size": 64,
        "steps": 1500,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
    },
    "vit": {"data": "uoft-cs/cifar10", "size": "micro", "batch_size": 256, "steps": 4000},
    "dit": {"data": "uoft-cs/cifar10", "size": "s", "batch_size": 128, "steps": 10_000},
}
_PAPER: dict[str, dict[str, Any]] = {
    "text": {
        "dim": 768,
        "num_layers": 12,
        "mlp_dim": 2048,
        "vocab_size": 65_536,
        "sequence_length": 2048,
        "device_batch_size": 4,
        "learning_rate": 3e-4,
        "warmup_steps": 2000,
        "domain_exponent": 1.0,
    },
    # 300 epochs of 1.28 million images, 5 of them warmup.
    "vit": {
        "data": "ILSVRC/imagenet-1k",
        "image_size": 224,
        "size": "small",
        "batch_size": 1024,
        "steps": 375_000,
        "learning_rate": 1e-3,
        "warmup_steps": 6250,
        "flip": 0.5,
        "rand_augment": 9,
        "erase": 0.25,
        "mixup": 0.5,
        "cutmix": 0.5,
    },
    "dit": {
        "data": "ILSVRC/imagenet-1k",
        "image_size": 256,
        "vae": "stabilityai/sd-vae-ft-ema",
        "batch_size": 256,
        "steps": 400_000,
        "learning_rate": 1e-4,
        "averaging": 0.9999,
        "flip": 0.5,
        "guidance_scale": 1.0,
        "sampling_steps": 250,
        "samples": 50,
    },
}


def tiny(study: str) -> StudyRun:
    """Minutes on 2 cores, 40 at most, with three seeds."""
    subject = STUDIES[study].subject
    fields: dict[str, Any] = {
        "study": study,
        "output": Path("runs") / study,
        "seeds": (0, 1, 2),
        "workers": 2,
    }
    return _RUNS[subject](**_TINY[subject] | fields | _OF_STUDIES.get(study, {}))


def small(study: str) -> StudyRun:
    """One GPU for about an hour, one seed."""
    fields: dict[str, Any] = {
        "scale": "small",
        "seeds": (0,),
        "workers": 1,
        "precision": "bf16",
    }
    fields |= _SMALL[STUDIES[study].subject] | _OF_SMALL.get(study, {})
    return dataclasses.replace(tiny(study), **fields)


def paper(study: str) -> StudyRun:
    """The papers' sizes, data and schedules, for many GPUs.

    **Source**: MH-MoE, arXiv 2411.16205, section 3, and MoH, arXiv 2410.11842, sections 4.1 to 4.3
    (ViT-S, DiT-S/2, LLM-S).
    **Deviates**: MH-MoE's paper gives neither learning rate nor vocabulary; they are MoH's. Its 40
    and 96 experts are 41 and 93 here, the numbers of equal parameters. Studies of MoH's parts that
    the paper made on images are made on text. Images have the same share of heads on in all
    layers, a tenth of those to train on is held out, and they are kept in memory: 200 GB.
    """
    subject = STUDIES[study].subject
    fields: dict[str, Any] = {"log_every": 50, "eval_every": 1000, "save_every": 1000}
    fields |= {"scale": "paper"} | _PAPER[subject]
    if subject == "text" and study.startswith("moh-"):
        # 100 billion tokens, 4.2 million a step.
        fields |= {"data": "moh-llm", "batch_size": 2048, "steps": 23_842}
    elif subject == "text":
        steps = 50_000 if study == "mhmoe-layers" else 100_000
        fields |= {"data": "red-pajama", "batch_size": 256, "steps": steps}
    return dataclasses.replace(small(study), **fields)


SCALES = {"tiny": tiny, "small": small, "paper": paper}
