"""Tuning a converted model until it does with some heads what it did with all: what to run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from headwise.data.text import check_exponent
from headwise.ops.choice import check_choice
from headwise.recipes.arguments import Precision, Stage, check_at_least, check_training

Schedule = Literal["small", "paper"]


@dataclass(frozen=True, kw_only=True)
class TuningRun:
    """Tune a model with routed heads, in the paper's two stages: every head on, then routed.

    A model that is not converted goes through the first stage only: something to compare with.

    Attributes:
        path: Directory of the model, as `headwise convert` or `save_pretrained` left it.
        output: Directory of the run.
        schedule: Says what the other fields default to: small (300 steps on the routed heads,
            minutes on a laptop for a small model) or paper (LLaMA3-8B as in the MoH paper, in two
            stages).
        data: Text: a file, a directory, or a Hugging Face dataset's name; or a .parquet file with a
            column "input_ids", as `headwise samples` writes it. Without it, the text that every
            Python carries.
        original: Directory of the model to be as good as, and to learn from; it must have the same
            tokenizer. Without it, the model in path itself, as it is, with every head on.
        dense: The first stage, every head on: adapts the model to the text.
        routed: The second stage, heads routed, the router's gradient straight through the choice.
        distill: Factor of the divergence from the original in the second stage's loss; 0 for none.
        batch_size: Sequences of a step, over all processes.
        device_batch_size: Sequences that a process takes at a time; without it all of its share.
        sequence_length: Tokens of a sequence.
        weight_decay: Weight decay of AdamW.
        precision: "fp32", or "bf16" for autocast.
        activation_checkpointing: Compute activations again in the backward pass, to save memory.
        domain_exponent: A domain of n tokens is drawn with weight n^domain_exponent.
        eval_blocks: Held-out sequences that perplexity is measured on.
        log_every: Steps between two lines of progress.
        eval_every: Steps between two points of the recovery curve.
        save_every: Steps between two checkpoints.
        seed: Seed of the order of the text.
        report_to: Trackers of transformers' Trainer: tensorboard, trackio, wandb, …
        resume: Go on with the run in the output directory.
        overwrite: Delete the run in the output directory and start anew.
    """

    path: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    schedule: Schedule = "small"
    data: str | None = None
    original: str | None = None
    dense: Stage
    routed: Stage
    distill: float
    batch_size: int
    device_batch_size: int | None = None
    sequence_length: int
    weight_decay: float = 0.1
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    domain_exponent: float = 0.5
    eval_blocks: int = 64
    log_every: int = 10
    eval_every: int = 50
    save_every: int = 100
    seed: int = 0
    report_to: tuple[str, ...] = field(default=())
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, Schedule)
        check_training(self)
        check_at_least(1, "eval_blocks", self.eval_blocks)
        check_at_least(2, "sequence_length", self.sequence_length)
        if not self.distill >= 0:
            raise ValueError(f"distill is {self.distill}; it must be at least 0")
        check_exponent("domain_exponent", self.domain_exponent)
        if self.dense.steps + self.routed.steps == 0:
            raise ValueError("dense.steps and routed.steps are both 0; there is nothing to train")


def small(path: str, output: Path) -> TuningRun:
    """Minutes on a laptop for a small model: routed stage only, with distillation."""
    return TuningRun(
        path=path,
        output=output,
        dense=Stage(steps=0, learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=20),
        routed=Stage(steps=300, learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=20),
        distill=10.0,
        batch_size=8,
        sequence_length=256,
    )


def paper(path: str, output: Path) -> TuningRun:
    """LLaMA3-8B as in the MoH paper: 300B tokens with every head on, then 100B routed.

    **Source**: arXiv 2410.11842, section 4.4 and appendix. Batches of 16M tokens, in sequences of
    8192; no distillation. **Deviates**: the vocabulary stays as it is; the paper enlarges it in
    the first stage.
    """
    return TuningRun(
        path=path,
        output=output,
        schedule="paper",
        dense=Stage(steps=17_881, learning_rate=6e-5, final_learning_rate=6e-6, warmup_steps=50),
        routed=Stage(steps=5_960, learning_rate=2e-5, final_learning_rate=1e-6, warmup_steps=50),
        distill=0.0,
        batch_size=2048,
        device_batch_size=1,
        sequence_length=8192,
        precision="bf16",
        activation_checkpointing=True,
        eval_every=100,
    )


SCHEDULES = {"small": small, "paper": paper}
