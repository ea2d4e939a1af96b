"""`headwise convert`: a directory with a pretrained model becomes one with routed heads."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from headwise.data.text import read
from headwise.data.token_files import TOKEN_FILE, Tokens, check_tokens, token_rows
from headwise.hf import MoHConfig, calibrate, convert
from headwise.hf.calibration import Batches, Measure
from headwise.hf.card import budget_lines, calibration_figures, model_card
from headwise.hf.loading import load_original
from headwise.loading import described, kind_of, load_tokenizer, longest_sequence
from headwise.nn import Budget
from headwise.nn.moh import HeadRouterName
from headwise.ops.fields import check_fields
from headwise.parsing import parsed
from headwise.progress import followed, plain_console
from headwise.results.files import check_new, write_whole
from headwise.results.table import Cell, Number, Table
from headwise.training.evaluation import FileLoss

_PIECE = 256  # tokens
_MOST_PIECES = 64


def main(argv: list[str]) -> None:
    """Run the command."""
    convert_directory(parsed(ConversionRun, argv, "headwise convert"))


@dataclass(frozen=True)
class ConversionRun:
    """Give a pretrained model Mixture-of-Head attention; its weights stay as they are.

    Attributes:
        path: Directory of the model, as transformers saves it, or its name on the Hugging Face hub.
        output: Directory for the converted model; must not hold anything yet.
        shared: Heads that are always on, a count or a share of all.
        active: Heads that a token switches on, shared ones included, a count or a share of all.
        router: query_norm (no parameters, ready at once), or two_stage or one_stage (learned; tune
            afterwards).
        route_groups: Query heads that share a key head are on or off together.
        layers: Numbers of the layers to convert, counted from 0; all of them if empty.
        calibrate: Text file, or tokens that `headwise write-text` wrote (.parquet), by which to
            choose the shared heads of each layer; without it they are the first ones. It is read in
            pieces of up to 256 tokens, of which at most the first 64 are taken: three quarters to
            choose by, the last quarter to compare the two.
        by: What calibration goes by: gradient of the loss with respect to the head's gate, loss (a
            forward for each head), or query_norm.
    """

    path: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    shared: Budget = 0.5
    active: Budget = 0.75
    router: HeadRouterName = "query_norm"
    route_groups: bool = False
    layers: tuple[int, ...] = ()
    calibrate: Path | None = None
    by: Measure = "gradient"

    def __post_init__(self) -> None:
        check_fields(self)
        check_new("output", self.output, or_empty=True)
        if self.calibrate is not None and not self.calibrate.is_file():
            raise ValueError(
                f"calibrate is {self.calibrate}, where there is no file; it must be a text file or "
                "tokens that `headwise write-text` wrote"
            )
        self.attention()

    def attention(self) -> MoHConfig:
        """The same as `convert` takes it."""
        return MoHConfig(
            shared=self.shared, active=self.active, router=self.router,
            route_groups=self.route_groups,
        )  # fmt: skip


def convert_directory(run: ConversionRun) -> PreTrainedModel:
    """Load, calibrate if asked to, convert, save beside and rename; returns the model.

    Raises:
        ValueError: If there is no model or it cannot be converted, or the text does not do.
        OSError: If the directory cannot be written.
    """
    console = plain_console()
    model, tokenizer = load_original(run.path), load_tokenizer(run.path)
    attention, perplexities = run.attention(), {}
    if run.calibrate is not None:
        _check_reads_text(run, model)
        pieces = _pieces(run.calibrate, tokenizer, model, run.path)
        batches = _batches(pieces[:_MOST_PIECES], model)
        kept = -(-len(batches) // 4)
        attention = calibrate(model, batches[:-kept], attention, by=run.by)
        perplexities = _comparison(run, model, attention, batches[-kept:])
        console.print(
            f"calibrated on pieces 1 to {len(batches) - kept} of the text's {len(pieces):,}, "
            f"compared on the next {kept}"
        )
        console.print(_table(perplexities).for_terminal())
        if perplexities["calibrated"] > perplexities["the first ones shared"]:
            console.print(
                "calibrated is worse here than the first ones: give more text, or no --calibrate"
            )
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
        figures=calibration_figures(perplexities),
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
    return model


def _check_reads_text(run: ConversionRun, model: Any) -> None:
    if kind_of(model.config) != "language model":
        raise ValueError(
            f"calibrate is {run.calibrate}, and {run.path} holds {described(model.config)}, not a "
            "language model; headwise.calibrate(model, batches, config) in Python takes batches of "
            "any kind"
        )


def _pieces(
    file: Path, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, path: str
) -> list[Tokens]:
    """The text in pieces, none longer than the model was made for."""
    length = int(min(_PIECE, longest_sequence(model)))
    if file.suffix == TOKEN_FILE:
        rows = token_rows(file)
    elif tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, and calibrate needs one; save one beside it")
    elif not (text := read(file)).strip():
        raise ValueError(f"calibrate is {file}, which holds no text")
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
        rows = np.split(np.array(ids, dtype=np.int32), range(length, len(ids), length))
    pieces = [row[:length] for row in rows if len(row) > 1]
    if len(pieces) < 2:
        tokens = sum(map(len, rows))
        least = "2 rows of 2 tokens" if file.suffix == TOKEN_FILE else f"more than {length} tokens"
        raise ValueError(f"calibrate is {file}, of {tokens} tokens in all; it must have {least}")
    check_tokens(np.concatenate(pieces), model.get_input_embeddings().num_embeddings, path)
    return pieces


def _batches(pieces: list[Tokens], model: PreTrainedModel) -> Batches:
    """Each piece with itself as labels."""
    ids = [torch.from_numpy(piece.astype(np.int64))[None].to(model.device) for piece in pieces]
    return [{"input_ids": piece, "labels": piece} for piece in ids]


def _comparison(
    run: ConversionRun, model: PreTrainedModel, calibrated: MoHConfig, batches: Batches
) -> dict[str, float]:
    """Perplexity on text that calibration has not seen."""
    perplexities = {"all on": _perplexity(model, batches)}
    configs = {"the first ones shared": run.attention(), "calibrated": calibrated}
    for name, attention in configs.items():
        converted = convert(copy.deepcopy(model), attention=attention, layers=run.layers or None)
        perplexities[name] = _perplexity(converted, batches)
    return perplexities


def _table(perplexities: dict[str, float]) -> Table:
    rows: list[list[Cell]] = [[name, Number(x, "{:.4g}")] for name, x in perplexities.items()]
    return Table(["heads", "perplexity"], rows)


def _perplexity(model: Any, batches: Batches) -> float:
    with torch.no_grad():
        tokens = [batch["labels"].numel() - 1 for batch in batches]
        shown = followed(batches, "perplexity", total=len(batches))
        nats = [model(**b).loss.item() * n for b, n in zip(shown, tokens, strict=True)]
    return FileLoss(sum(nats), sum(tokens)).perplexity
