"""`headwise parity`: MH-MoE layers that cost what a sparse mixture of experts does."""

from dataclasses import dataclass

from headwise.parity import Match, Mixture, match_sparse_moe
from headwise.parsing import parsed
from headwise.progress import plain_console
from headwise.results.table import Cell, Number, Table

_COLUMNS = ("heads", "s", "k", "f", "E", "MFLOPs", "ratio", "params (M)", "ratio")
_LEGEND = (
    "sparse: the sparse MoE; s: width of a sub-token; k: experts of each; f: hidden width of an "
    "expert; E: experts; exact → rounded. MFLOPs: per token. Ratios: to the sparse MoE. Without "
    "routers."
)

# Of the ratio of parameters from 1.
_FAR = 0.1


def main(argv: list[str]) -> None:
    """Run the command."""
    print_parity(parsed(ParityRun, argv, "headwise parity"))


@dataclass(frozen=True)
class ParityRun:
    """Print the MH-MoE layers that cost what a sparse mixture of experts does.

    The other way round is a function: headwise.parity.match_mh_moe.

    Attributes:
        dim: Width of the tokens.
        num_experts: Experts of the sparse MoE.
        top_k: Experts that its tokens go to.
        expert_dim: Hidden width of its experts.
        heads: Numbers of sub-tokens to try; each divides dim.
        top_k_mh: Experts that a sub-token goes to; without it heads · top_k, as in the paper.
        glu: Gated experts (three matrices) on both sides, or plain ones (two).
        multiple_of: The MH-MoE's expert_dim is rounded to a multiple of this.
        experts_multiple_of: Its num_experts is rounded to a multiple of this; the paper's are of 8.
    """

    dim: int
    num_experts: int
    top_k: int
    expert_dim: int
    heads: tuple[int, ...]
    top_k_mh: int | None = None
    glu: bool = True
    multiple_of: int = 8
    experts_multiple_of: int = 1

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("heads is empty; give at least one number")

    @property
    def sparse(self) -> Mixture:
        """The sparse MoE to match."""
        return Mixture(self.dim, self.num_experts, self.top_k, self.expert_dim, glu=self.glu)

    def match(self, heads: int) -> Match:
        """The MH-MoE of that many heads; a ValueError says why there is none."""
        return match_sparse_moe(
            self.dim,
            self.num_experts,
            self.top_k,
            self.expert_dim,
            heads=heads,
            top_k_mh=self.top_k_mh,
            glu=self.glu,
            multiple_of=self.multiple_of,
            experts_multiple_of=self.experts_multiple_of,
        )


def print_parity(run: ParityRun) -> None:
    """Print a row for the sparse MoE and one for each number of heads, what was rounded below.

    Raises:
        ValueError: If no number of heads is possible, with the reasons.
    """
    table, notes = comparison(run)
    console = plain_console()
    console.print(table.for_terminal())
    for note in notes:
        console.print(note)


def comparison(run: ParityRun) -> tuple[Table, list[str]]:
    """The table; and notes: what was rounded, why there is no such layer.

    Raises:
        ValueError: If no number of heads is possible, with the reasons.
    """
    sparse = run.sparse
    rows: list[list[Cell]] = [["sparse", *_sizes(sparse), *_cost(sparse, sparse)]]
    notes, reasons = [], []
    for heads in run.heads:
        name = f"{heads} head{'' if heads == 1 else 's'}"
        try:
            match = run.match(heads)
        except ValueError as error:
            rows.append([str(heads), "", "", "impossible", "", "", "", "", ""])
            notes.append(f"{name}: {error}")
            reasons.append(str(error))
            continue
        sizes = _sizes(match.found, match.exact_expert_dim, match.exact_num_experts)
        rows.append([str(heads), *sizes, *_cost(match.found, sparse)])
        notes += [f"{name}: {note}" for note in match.rounded]
        ratio = match.found.parameters / sparse.parameters
        if abs(ratio - 1) > _FAR:
            notes.append(
                f"{name}: {ratio:.2f} times the sparse MoE's parameters is no parity; round to less"
            )
    if len(reasons) == len(run.heads):
        raise ValueError("; ".join(dict.fromkeys(reasons)))
    return Table(_COLUMNS, rows, _LEGEND), notes


def _sizes(found: Mixture, width: float | None = None, experts: float | None = None) -> list[Cell]:
    return [
        Number(found.sub_dim),
        Number(found.top_k),
        _rounded(width, found.expert_dim),
        _rounded(experts, found.num_experts),
    ]


def _rounded(exact: float | None, value: int) -> Number:
    return Number(value, "{}" if exact in (None, value) else f"{exact:.2f} → {{}}")


def _cost(found: Mixture, sparse: Mixture) -> list[Cell]:
    return [
        Number(found.flops / 1e6, "{:.3f}"),
        Number(found.flops / sparse.flops, "{:.3f}"),
        Number(found.parameters / 1e6, "{:.3f}"),
        Number(found.parameters / sparse.parameters, "{:.3f}"),
    ]
