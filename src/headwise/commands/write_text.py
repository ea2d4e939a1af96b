"""`headwise write-text`: a model's own text, to tune on where its training text is not at hand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate.utils import set_seed

from headwise.data.token_files import TOKEN_COLUMN, TOKEN_FILE
from headwise.loading import check_length, load_causal_lm
from headwise.memory import check_memory
from headwise.parsing import parsed
from headwise.progress import followed
from headwise.results.files import check_new, write_whole
from headwise.training.fields import check_at_least, check_seed


def main(argv: list[str]) -> None:
    """Run the command."""
    write_text(parsed(WritingRun, argv, "headwise write-text"))


@dataclass(frozen=True)
class WritingRun:
    """Let a model write, from its first token on, and keep the tokens for `headwise tune --data`.

    Sampled at temperature 1 from the whole vocabulary, so the model is the best predictor of its
    samples; a text goes on after its end.

    Attributes:
        path: Directory of the model, or its name on the Hugging Face hub.
        output: File to write, .parquet.
        count: How many texts to write.
        length: Tokens of each text, the first one included.
        batch_size: Texts written at a time.
        seed: Seed of the sampling.
    """

    path: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    count: int = 1000
    length: int = 256
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.output.suffix != TOKEN_FILE:
            raise ValueError(f"output is {self.output}; its name must end in {TOKEN_FILE}")
        check_new("output", self.output)
        for name, least in (("count", 1), ("length", 2), ("batch_size", 1)):
            check_at_least(least, name, getattr(self, name))
        tokens = 8 * self.count * self.length
        check_memory(tokens, "the tokens", count=self.count, length=self.length)
        check_seed("seed", self.seed)


def write_text(run: WritingRun) -> None:
    """Sample and write, beside and renamed.

    Raises:
        ValueError: If there is no model, or it has no first token (`bos_token_id`).
    """
    # Imported here: help works without it.
    from datasets import Dataset

    model = load_causal_lm(run.path).eval()
    check_length("length", run.length, model, run.path)
    first = model.config.bos_token_id
    if first is None:
        raise ValueError(f"{run.path} has no bos_token_id, with which a text would begin")
    set_seed(run.seed)
    rows: list[list[int]] = []
    starts = range(0, run.count, run.batch_size)
    for start in followed(starts, "sampling", total=len(starts)):
        first_tokens = torch.full(
            (min(run.batch_size, run.count - start), 1), first, device=model.device
        )
        rows += _continue(model, first_tokens, run.length)
    tokens = Dataset.from_dict({TOKEN_COLUMN: rows})
    write_whole(run.output, lambda partial: tokens.to_parquet(str(partial)))
    print(f"{run.count:,} texts of {run.length} tokens in {run.output}")


@torch.no_grad()
def _continue(model: Any, first_tokens: torch.Tensor, length: int) -> list[list[int]]:
    new = length - first_tokens.shape[1]
    return model.generate(
        first_tokens,
        attention_mask=torch.ones_like(first_tokens),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,  # no token: a text goes on after its end
        max_new_tokens=new,
    ).tolist()
