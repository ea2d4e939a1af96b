"""`headwise convert`: a directory with a pretrained model becomes one with routed heads."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from headwise.analysis.tables import speed_table
from headwise.commands.calibration import fills_masks, perplexities, read_texts, twin
from headwise.hf import FittedHeads, MoHConfig, calibrate, convert, fit
from headwise.hf.calibration import Batches, Measure
from headwise.hf.card import budget_lines, model_card
from headwise.hf.fitting.heads import Allocation
from headwise.hf.head_configs import RouterName
from headwise.hf.loading import load_original
from headwise.loading import described, kind_of, load_tokenizer, longest_sequence
from headwise.nn import ActiveBudget, Budget
from headwise.ops.fields import check_fields
from headwise.parsing import parsed
from headwise.progress import plain_console
from headwise.results.files import check_new, write_whole
from headwise.results.table import Table
from headwise.training.speed import time_models

_TIMED_CONTEXT = 1024


def main(argv: list[str]) -> None:
    """Run the command."""
    convert_directory(parsed(ConversionRun, argv, "headwise convert"))


@dataclass(frozen=True)
class ConversionRun:
    """Give a pretrained model Mixture-of-Head attention; its weights stay as they are.

    Attributes:
        path: Directory of the model, as transformers saves it, or its name on the Hugging Face hub.
        output: Directory for the converted model; must not hold anything yet.
        shared: Heads that are always on, a count or a share of all. By default none with a fitted
            router, half with query_norm, 0.4 with a learned one.
        active: Heads that a token switches on, shared ones included, a count or a share of all;
            with a fitted router on average over the layers.
        router: fitted (to the text of calibrate, with which it is the default), query_norm (no
            parameters, the default without a text), or two_stage or one_stage (learned; tune
            afterwards).
        allocate: Of a fitted router: loss spends the budget over the layers where the loss needs
            it, alike gives every layer the same.
        route_groups: Query heads that share a key head are on or off together.
        layers: Numbers of the layers to convert, counted from 0; all of them if empty.
        calibrate: Text files, or tokens that `headwise write-text` wrote (.parquet), to fit routers
            to; for other routers to choose the shared heads of each layer by, which else are the
            first ones. Several files are a mixture of equal parts. They are read in pieces of up to
            512 tokens, of which at most 40 are taken: four fifths to fit to, the last fifth to
            compare on.
        by: What the choice of shared heads goes by: gradient of the loss with respect to the head's
            gate, loss (a forward for each head), or query_norm.
    """

    path: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    shared: Budget | None = None
    active: ActiveBudget = 0.75
    router: RouterName | None = None
    allocate: Allocation = "loss"
    route_groups: bool = False
    layers: tuple[int, ...] = ()
    calibrate: tuple[Path, ...] = ()
    by: Measure = "gradient"

    def __post_init__(self) -> None:
        check_fields(self)
        check_new("output", self.output, or_empty=True)
        for file in self.calibrate:
            if not file.is_file():
                found = "a directory" if file.is_dir() else "where there is no file"
                raise ValueError(
                    f"calibrate is {file}, {found}; it must be text files or tokens that `headwise "
                    "write-text` wrote"
                )
        if self.router == "fitted" and not self.calibrate:
            raise ValueError(
                "router is 'fitted', and there is no text to fit it to; give one with --calibrate"
            )
        if self.allocate != "loss" and not self.is_fitted:
            raise ValueError(
                f"allocate is {self.allocate!r}, and no router is fitted; it goes with --calibrate "
                "and --router fitted"
            )
        if self.by != "gradient" and (self.is_fitted or not self.calibrate):
            raise ValueError(
                f"by is {self.by!r}, and no shared heads are chosen; it goes with --calibrate and "
                "another router than fitted"
            )
        self.attention()

    @property
    def is_fitted(self) -> bool:
        """Whether routers are fitted to a text."""
        return bool(self.calibrate) and self.router in (None, "fitted")

    def attention(self) -> MoHConfig:
        """The same as `convert` takes it, before calibration."""
        router = "fitted" if self.is_fitted else self.router or "query_norm"
        return MoHConfig(
            shared=self.shared, active=self.active, router=router, route_groups=self.route_groups
        )


def convert_directory(run: ConversionRun) -> PreTrainedModel:
    """Load, fit or calibrate if asked to, convert, save beside and rename; returns the model.

    Raises:
        ValueError: If there is no model or it cannot be converted, or the text does not do.
        OSError: If the directory cannot be written.
    """
    console = plain_console()
    model, tokenizer = load_original(run.path), load_tokenizer(run.path)
    attention: MoHConfig | FittedHeads = run.attention()
    dense, measured = None, None
    if run.calibrate:
        dense = twin(model)
        _check_reads_text(run, model)
        texts = read_texts(run.calibrate, tokenizer, model, run.path)
        console.print(texts.note)
        attention = _calibrated(run, model, texts.calibration)
        measured = _comparison(run, model, attention, texts.held_out)
        console.print(measured.for_terminal())
    try:
        convert(model, attention=attention, layers=run.layers or None)
    except ValueError as error:
        raise ValueError(f"{run.path}: {error}") from error
    image_processor = cached_file(
        run.path, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False
    )

    card = model_card(
        model,
        run.path,
        run.output.name,
        weights="The weights are those of the original; they were not tuned since.",
        figures="" if measured is None else f"\n{measured.markdown()}\n",
    )

    def write(directory: Path) -> None:
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if image_processor is not None:
            shutil.copy(image_processor, directory)
        (directory / "README.md").write_text(card)

    write_whole(run.output, write)
    if tokenizer is None and image_processor is None:
        console.print(f"{run.path} has no tokenizer, so {run.output} has none")
    for line in budget_lines(model):
        console.print(line)
    console.print(f"saved in {run.output}")
    if dense is not None:
        _print_speed(console, dense, model.eval())
    return model


def _print_speed(console: Console, dense: Any, routed: Any) -> None:
    """What a prompt and the next token cost here, where both models can be timed."""
    if fills_masks(routed):
        console.print("not timed: a model that fills masks has no next token")
        return
    # The next token after these must have a position, too.
    context = int(min(_TIMED_CONTEXT, longest_sequence(routed) - 1))
    try:
        timed = time_models(dense, routed, contexts=[context])
    # Of models with layers and caches of all kinds. What was converted is saved, and stays so.
    except Exception as error:
        console.print(f"not timed: {type(error).__name__}: {error}")
        return
    console.print(speed_table(timed.speeds).for_terminal())
    console.print(timed.note)


def _check_reads_text(run: ConversionRun, model: Any) -> None:
    if kind_of(model.config) != "language model":
        name = "fit" if run.is_fitted else "calibrate"
        raise ValueError(
            f"calibrate is {run.calibrate[0]}, and {run.path} holds {described(model.config)}, not "
            f"a language model; headwise.{name}(model, batches, config) in Python takes batches of "
            "any kind"
        )


def _calibrated(
    run: ConversionRun, model: PreTrainedModel, batches: Batches
) -> MoHConfig | FittedHeads:
    if not run.is_fitted:
        return calibrate(model, batches, run.attention(), by=run.by)
    layers = run.layers or None
    return fit(model, batches, run.attention(), allocate=run.allocate, layers=layers)


def _comparison(
    run: ConversionRun,
    model: PreTrainedModel,
    calibrated: MoHConfig | FittedHeads,
    texts: Mapping[str, Batches],
) -> Table:
    """Perplexity on text that calibration has not seen: of the original, and converted.

    Calibrated routers are compared with the first heads shared.
    """
    if run.is_fitted:
        configs: dict[str, MoHConfig | FittedHeads] = {"fitted": calibrated}
    else:
        configs = {"the first ones shared": run.attention(), "calibrated": calibrated}
    models = {
        name: convert(twin(model), attention=attention, layers=run.layers or None)
        for name, attention in configs.items()
    }
    return perplexities({"all on": model, **models}, texts)
