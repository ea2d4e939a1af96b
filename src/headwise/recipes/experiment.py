"""`headwise experiment`: the papers' studies at a scale."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from headwise.ops.choice import check_choice
from headwise.recipes.comparison import TextRun, Variant
from headwise.recipes.studies import STUDIES, Study

Scale = Literal["tiny", "small", "paper"]


@dataclass(frozen=True, kw_only=True)
class StudyRun(TextRun):
    """A study at a scale. The scale says what the other fields default to.

    Attributes:
        study: Which one.
        scale: The one whose sizes and steps the fields had, before any was given.
    """

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

    def variants(self) -> list[Variant]:
        return list(self._study.variants(self))

    def cost_of(self) -> Variant | None:
        return super().cost_of() if self._study.equal_cost else None


def tiny(study: str) -> StudyRun:
    """At most 20 minutes on 2 cores, with three seeds."""
    return StudyRun(
        study=study,
        output=Path("runs") / study,
        seeds=(0, 1, 2),
        workers=2,
        dim=96,
        mlp_dim=256,
        vocab_size=2048,
        sequence_length=128,
        steps=500,
        warmup_steps=50,
    )


def small(study: str) -> StudyRun:
    """One GPU for about an hour, one seed."""
    return dataclasses.replace(
        tiny(study),
        scale="small",
        seeds=(0,),
        workers=1,
        dim=384,
        num_layers=8,
        num_heads=12,
        mlp_dim=1024,
        vocab_size=8192,
        sequence_length=512,
        batch_size=64,
        steps=1500,
        learning_rate=1e-3,
        warmup_steps=100,
        precision="bf16",
    )


def paper(study: str) -> StudyRun:
    """The papers' sizes, text and schedules, for many GPUs.

    **Source**: MH-MoE, arXiv 2411.16205, section 3, and MoH-LLM-S, arXiv 2410.11842, section 4.3.
    **Deviates**: MH-MoE's paper gives neither learning rate nor vocabulary; they are MoH's. Its 40
    and 96 experts are 41 and 93 here, the numbers of equal parameters. Studies of MoH that the
    paper made on images are made on text.
    """
    common = dataclasses.replace(
        small(study),
        scale="paper",
        dim=768,
        num_layers=12,
        mlp_dim=2048,
        vocab_size=65_536,
        sequence_length=2048,
        device_batch_size=4,
        learning_rate=3e-4,
        warmup_steps=2000,
        domain_exponent=1.0,
        log_every=50,
        eval_every=1000,
        save_every=1000,
    )
    if study.startswith("moh-"):
        # 100 billion tokens, 4.2 million a step.
        return dataclasses.replace(common, data="moh-llm", batch_size=2048, steps=23_842)
    steps = 50_000 if study == "mhmoe-layers" else 100_000
    return dataclasses.replace(common, data="red-pajama", batch_size=256, steps=steps)


SCALES = {"tiny": tiny, "small": small, "paper": paper}
