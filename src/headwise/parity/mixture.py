"""The sizes of a mixture of experts, and what it costs."""

from dataclasses import dataclass

from headwise.ops.fields import Count, check_fields


@dataclass(frozen=True)
class Mixture:
    """The sizes of a mixture of experts, and what it costs without its router.

        FLOPs of a token:  2·m·d·f·k  [+ 4·d²]        m = 3 matrices an expert (glu) or 2
        parameters:        m·s·f·E    [+ 2·d²]        s = d / h; in brackets: head and merge layer

    **Source**: MH-MoE, arXiv 2411.16205, Eq. 8 and 9 (two matrices) and its tables (three).

    Attributes:
        dim: d, width of the tokens.
        num_experts: E, all experts.
        top_k: k, experts that a token goes to, or each of its sub-tokens.
        expert_dim: f, hidden width of an expert.
        heads: h, sub-tokens of a token, with head and merge layer around the experts; divides dim.
            None for a sparse MoE, which has neither.
        glu: Gated experts.

    Raises:
        ValueError: If a count is no int or below 1, top_k exceeds num_experts, or heads does not
            divide dim.
    """

    dim: Count
    num_experts: Count
    top_k: Count
    expert_dim: Count
    heads: Count | None = None
    glu: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}; it must lie in 1..{self.num_experts} (num_experts)"
            )
        if self.heads is not None:
            check_heads(self.heads, self.dim)

    @property
    def sub_dim(self) -> int:
        """s, width of what an expert reads."""
        return self.dim // (self.heads or 1)

    @property
    def flops(self) -> int:
        """FLOPs of a token."""
        return 2 * (self.around + self.matrices * self.dim * self.expert_dim * self.top_k)

    @property
    def parameters(self) -> int:
        """All of them, of experts that a token does not use too."""
        return self.around + self.matrices * self.sub_dim * self.expert_dim * self.num_experts

    @property
    def around(self) -> int:
        """Parameters of head and merge layer, which each token meets once."""
        return 0 if self.heads is None else 2 * self.dim**2

    @property
    def matrices(self) -> int:
        """m, of an expert."""
        return 3 if self.glu else 2


def check_heads(heads: int, dim: int) -> None:
    """Raises ValueError unless a token of that width can be cut into so many parts."""
    if dim % heads:
        raise ValueError(f"heads is {heads}; it must divide dim = {dim}")
