"""Language models of several languages at equal cost: dense, sparse MoE, X-MoE and MH-MoE."""

from dataclasses import dataclass
from pathlib import Path

from headwise.data.text import subdirectories
from headwise.recipes import text
from headwise.recipes.decoders import TextRun
from headwise.recipes.layered import first_paper_models
from headwise.recipes.text import TextTask
from headwise.training.comparison import Variant


@dataclass(frozen=True, kw_only=True)
class MultilingualRun(TextRun):
    """Four models of several languages at equal FLOPs per token: dense, moe, x_moe, mh_moe.

    A language of n tokens is drawn with weight n^domain_exponent, that is at the temperature
    1 / domain_exponent; XLM-R (arXiv 1911.02116) takes 0.3. Perplexity is reported for each
    language: it compares models of a language, not languages, whose tokens differ in length.

    **Source**: the second task of MH-MoE's first paper, arXiv 2404.15045.

    Attributes:
        data: A directory with a directory for each language; `bash docs/multilingual.sh DIR` makes
            one of eight languages.
        mh_heads: MH-MoE: sub-tokens of a token.
        mh_top_k: MH-MoE: experts that a sub-token goes to.
    """

    output: Path = Path("runs/multilingual")
    sequence_length: int = 128
    batch_size: int = 16
    domain_exponent: float = 0.3
    sample_prompt: str = "The "
    mh_heads: int = 2
    mh_top_k: int = 2

    @property
    def recipe(self) -> str:
        return "multilingual"

    @property
    def title(self) -> str:
        return "Models of several languages at equal FLOPs per token"

    def variants(self) -> list[Variant]:
        """Dense first: the others are given its cost."""
        return first_paper_models(self, heads=self.mh_heads, top_k=self.mh_top_k)


def read(run: MultilingualRun) -> TextTask:
    """The text that `run.data` names, of two languages or more.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    if run.data is None:
        raise ValueError(
            "data is None; it must be a directory with a directory for each language: "
            "`bash docs/multilingual.sh DIR` makes one of eight languages"
        )
    if Path(run.data).is_dir() and len(subdirectories(Path(run.data))) < 2:
        raise ValueError(
            f"data is {run.data!r}, which has no directories for languages; it must "
            "have two or more"
        )
    return text.read(run)
