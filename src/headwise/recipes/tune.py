"""Tuning a converted model until it does with some heads what it did with all. It resumes."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import PartialState
from accelerate.utils import set_seed
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, default_data_collator

from headwise.data.sampling import spread
from headwise.data.split_tokens import SplitTokens, is_token_file, load_tokens
from headwise.data.text import MixedBlocks, check_exponent
from headwise.data.token_files import check_tokens
from headwise.errors import reading
from headwise.hf import restore
from headwise.hf.auto import Routed
from headwise.hf.card import model_card
from headwise.loading import check_length, load_causal_lm, load_tokenizer
from headwise.ops.choice import check_choice
from headwise.recipes import recovery
from headwise.recipes.recovery import Point
from headwise.results.files import write_manifest, write_whole
from headwise.results.rows import Row, environment
from headwise.training.directory import RunDirectory, fingerprint
from headwise.training.fields import Stage, TrainingRun, check_at_least

Schedule = Literal["small", "paper"]


@dataclass(frozen=True, kw_only=True)
class TuningRun(TrainingRun):
    """Tune a model with routed heads, in the paper's two stages: every head on, then routed.

    A model that is not converted goes through the first stage only: something to compare with.

    Attributes:
        path: Directory of the model, as `headwise convert` or `save_pretrained` left it.
        schedule: Says what the other fields default to: small (300 steps on the routed heads,
            minutes on a laptop for a small model) or paper (LLaMA3-8B as in the MoH paper, in two
            stages).
        data: Text: a file, a directory, or a Hugging Face dataset's name; or a .parquet file with a
            column "input_ids", as `headwise write-text` writes it. Without it, the text that every
            Python carries.
        eval_data: Text that perplexity is measured on, given as `data` is. Without it, a tenth of
            `data`, which is then held out of training.
        original: Directory of the model to be as good as, and to learn from; it must have the same
            tokenizer. Without it, the model in path itself, as it is, with every head on.
        dense: The first stage, every head on: adapts the model to the text.
        routed: The second stage, heads routed, the router's gradient straight through the choice.
        distill: Factor of the divergence from the original in the second stage's loss; 0 for none.
        batch_size: Sequences of a step, over all processes.
        device_batch_size: Sequences that a process takes at a time; without it all of its share.
        sequence_length: Tokens of a sequence.
        activation_checkpointing: Compute activations again in the backward pass, to save memory.
        domain_exponent: A domain of n tokens is drawn with weight n^domain_exponent.
        eval_blocks: Sequences that perplexity is measured on.
        log_every: Steps between two lines of progress.
        eval_every: Steps between two points of the recovery curve.
        seed: Seed of the order of the text.
    """

    everyday: ClassVar[tuple[str, ...]] = (
        "path", "output", "schedule", "data", "eval_data", "original", "distill", "batch_size",
        "sequence_length", "resume", "overwrite",
    )  # fmt: skip

    path: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    schedule: Schedule = "small"
    eval_data: str | None = None
    original: str | None = None
    dense: Stage
    routed: Stage
    distill: float
    sequence_length: int
    activation_checkpointing: bool = False
    domain_exponent: float = 0.5
    eval_blocks: int = 64
    eval_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, Schedule)
        super().__post_init__()
        check_at_least(1, "eval_blocks", self.eval_blocks)
        check_at_least(2, "sequence_length", self.sequence_length)
        if not self.distill >= 0:
            raise ValueError(f"distill is {self.distill}; it must be at least 0")
        check_exponent("domain_exponent", self.domain_exponent)
        if self.total_steps == 0:
            raise ValueError("dense.steps and routed.steps are both 0; there is nothing to train")

    @property
    def total_steps(self) -> int:
        return self.dense.steps + self.routed.steps

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        return self.sequence_length, {"sequence_length": self.sequence_length}


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


_POINTS_FILE = "recovery.json"


class _Setting(NamedTuple):
    """What the stages share."""

    run: TuningRun
    directory: RunDirectory
    state: PartialState
    tokenizer: PreTrainedTokenizerBase | None
    held_out: list[dict[str, torch.Tensor]]
    original: Any


def tune(run: TuningRun) -> None:
    """Tune the model of the run, and write how much of the original's quality it has.

    Raises:
        ValueError: For a model, text or directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    # Imported here: help works without what trains.
    from headwise.training.arguments import prepare

    state, directory = prepare(run)
    model, tokenizer = _load(run.path), load_tokenizer(run.path)
    if not isinstance(model, Routed) and not run.dense.steps:
        raise ValueError(
            f"dense.steps is 0, and the model in {run.path} has no routed heads to tune; convert "
            "it with `headwise convert`, or give dense.steps"
        )
    check_length("sequence_length", run.sequence_length, model, run.path)
    # Before anything is written, for a model whose MLPs were replaced cannot be restored.
    dense = restore(model) if isinstance(model, Routed) and run.dense.steps else model
    original = _original(run, model, tokenizer)
    text = _load_tokens(run, tokenizer, model.get_input_embeddings().num_embeddings)
    dense_blocks, routed_blocks = _training_blocks(run, text)
    setting = _Setting(run, directory, state, tokenizer, _held_out_blocks(run, text), original)
    main = state.is_main_process
    sums = fingerprint({name: [stream] for name, stream in text.training.items()})
    with directory.held_by(run, sums) if main else nullcontext():
        state.wait_for_everyone()
        points = _train_stages(setting, dense, dense_blocks, model, routed_blocks)
        if main:
            stages = dict.fromkeys(point.stage for point in points)
            models = {stage: directory.model(_name(stage, run)) for stage in stages}
            recovery.report(_rows(run, points), run.output, models)


def _train_stages(
    setting: _Setting, dense: Any, dense_blocks: Dataset, model: Any, routed_blocks: Dataset
) -> list[Point]:
    run, points = setting.run, []
    if run.dense.steps:
        points += _train(setting, "dense", run.dense, dense, dense_blocks)
    if isinstance(model, Routed) and run.routed.steps:
        if run.dense.steps:
            adapted = _load(setting.directory.model(_name("dense", run)))
            model.load_state_dict(adapted.state_dict(), strict=False)  # all but the routers
        points += _train(setting, "routed", run.routed, model, routed_blocks)
    return points


def _name(stage: str, run: TuningRun) -> str:
    """Of a stage's files."""
    return f"{stage}-seed{run.seed}"


def _load(path: str | Path) -> Any:
    """In float32, which weights are trained in."""
    return load_causal_lm(str(path), dtype=torch.float32)


def _original(run: TuningRun, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if run.original is None:
        # Not the model itself, which learns.
        return restore(model) if isinstance(model, Routed) else _load(run.path)
    original, other = _load(run.original), load_tokenizer(run.original)
    if tokenizer is not None and other is not None and tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"original is {run.original}, whose tokenizer is not that of {run.path}; a model can "
            "only be compared with one that reads the same tokens"
        )
    if original.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"original is {run.original}, with {original.config.vocab_size} entries in its "
            f"vocabulary; the model in {run.path} has {model.config.vocab_size}"
        )
    return original


def _train(setting: _Setting, name: str, stage: Stage, model: Any, blocks: Dataset) -> list[Point]:
    """Train a stage and save its model; when it is finished already, read what it came to."""
    run, state = setting.run, setting.state
    finished = setting.directory.model(_name(name, run))
    if finished.exists():
        file = finished / _POINTS_FILE
        with reading(file, hint=f"delete {finished} to train that stage again"):
            return [Point(**point) for point in json.loads(file.read_text())]
    set_seed(run.seed)
    trainer = _trainer(setting, name, stage, model, blocks)
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    before = run.dense.steps * trainer.speed.per_step if name == "routed" else 0
    points = recovery.points(name, model, trainer, tokens_before=before)
    # Gathered from shards, tied weights come as copies of each other.
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {k: v for k, v in gathered.items() if k not in model.all_tied_weights_keys}

    def save(directory: Path) -> None:
        model.save_pretrained(directory, state_dict=weights)
        if setting.tokenizer is not None:
            setting.tokenizer.save_pretrained(directory)
        (directory / _POINTS_FILE).write_text(json.dumps([p._asdict() for p in points]))
        write_manifest(directory)
        # After the manifest: the card may be edited.
        if isinstance(model, Routed):
            (directory / "README.md").write_text(_card(run, finished, model, points))

    if state.is_main_process:
        write_whole(finished, save)
    state.wait_for_everyone()
    return points


def _rows(run: TuningRun, points: list[Point]) -> list[Row]:
    return [
        {
            "model": Path(run.path).name,
            "seed": run.seed,
            "distill": run.distill if point.stage == "routed" else 0.0,
            **point._asdict(),
            **environment(run.precision),
        }
        for point in points
    ]


def _card(run: TuningRun, directory: Path, model: Any, points: list[Point]) -> str:
    last = points[-1]
    weights = (
        f"Tuned on {last.tokens:,} tokens of {Path(run.data).name if run.data else 'text'}, "
        f"divergence from the original weighted {run.distill:g} (0: none)."
    )
    figures = (
        f"\nPerplexity of held-out text: {last.perplexity}, the original's "
        f"{last.original_perplexity}: {last.recovery} % recovered.\n"
    )
    name = "/".join(directory.parts[-3:])
    return model_card(model, run.original or run.path, name, weights=weights, figures=figures)


def _trainer(setting: _Setting, name: str, stage: Stage, model: Any, blocks: Dataset) -> Any:
    # Imported here: help works without what trains.
    from headwise.training.arguments import training_arguments
    from headwise.training.distillation import RecoveringTrainer

    run, directory = setting.run, setting.directory
    return RecoveringTrainer(
        model=model,
        args=training_arguments(
            run, stage, seed=run.seed, state=setting.state,
            checkpoints=directory.checkpoints(_name(name, run)), name=f"{run.output.name}-{name}",
            eval_on_start=True, activation_checkpointing=run.activation_checkpointing,
        ),
        train_dataset=blocks,
        eval_dataset=setting.held_out,
        data_collator=default_data_collator,
        title=name,
        per_step=run.batch_size * run.sequence_length,
        original=setting.original,
        distill=run.distill if name == "routed" else 0.0,
    )  # fmt: skip


def _load_tokens(
    run: TuningRun, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> SplitTokens:
    """The tokens to train on, and those to measure on.

    Raises:
        ValueError: If there is no text or no tokenizer for it, or its tokens are not the model's.
    """

    def load(data: str | None) -> SplitTokens:
        if tokenizer is None and not is_token_file(data):
            raise ValueError(
                f"{run.path} has no tokenizer, and text needs one; save one beside it, or give "
                "data that `headwise write-text` wrote"
            )
        return load_tokens(data, tokenizer, run.sequence_length)

    split = load(run.data)
    if run.eval_data is not None:
        split = SplitTokens(training=split.whole(), held_out=load(run.eval_data).whole())
    for stream in (*split.training.values(), *split.held_out.values()):
        check_tokens(stream, vocab_size, run.path)
    return split


def _training_blocks(run: TuningRun, text: SplitTokens) -> tuple[Dataset, Dataset]:
    """The sequences of the dense stage, then those of the routed one, which go on from there."""
    blocks = MixedBlocks(
        text.training,
        sequence_length=run.sequence_length,
        num_blocks=(run.dense.steps + run.routed.steps) * run.batch_size,
        exponent=run.domain_exponent,
        seed=run.seed,
    )
    first = run.dense.steps * run.batch_size
    return Subset(blocks, range(first)), Subset(blocks, range(first, len(blocks)))


def _held_out_blocks(run: TuningRun, text: SplitTokens) -> list[dict[str, torch.Tensor]]:
    """`run.eval_blocks` sequences, spread evenly over what is held out."""
    length = run.sequence_length
    blocks = [
        stream[start : start + length]
        for stream in text.held_out.values()
        for start in range(0, len(stream) - length + 1, length)
    ]
    if not blocks:
        held_out = "held out of data" if run.eval_data is None else "in eval_data"
        raise ValueError(
            f"sequence_length is {length}, longer than all that is {held_out} = "
            f"{run.eval_data or run.data}"
        )
    picks = spread(len(blocks), run.eval_blocks)
    ids = [torch.from_numpy(blocks[i].astype(np.int64)) for i in picks]
    return [{"input_ids": block, "labels": block} for block in ids]
