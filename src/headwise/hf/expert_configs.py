"""Frozen descriptions of mixtures of experts, for `convert(mlp=)`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from headwise.nn import MHMoE, MoE
from headwise.nn.mh_moe import ExpertRouterName
from headwise.ops.activations import Activation
from headwise.ops.balance import BalanceForm, BalanceScope
from headwise.ops.fields import Count, Index, Weight, check_fields, checked
from headwise.ops.scores import TokenScores

ExpertsFrom = Literal["random", "mlp"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """An ordinary sparse mixture of experts in place of a model's MLP. Fields are `MoE`'s.

    Attributes:
        balance_coefficient: Factor of the balance loss in the training loss.
        z_loss_coefficient: Factor of the router's z-loss in the training loss.
        balance_form: Which balance loss: "scaled", "plain" or "first_choice" (`balance_loss`).
        balance_scope: Whose load it counts: that of each "process", or of "all" of a training run.
        experts_from: "random", or "mlp": expert e starts as the e-th slice of the hidden units of
            the gated MLP that it replaces, so num_experts * expert_dim must be the MLP's hidden
            width. With every expert on (top_k = num_experts) the layer starts as the MLP, up to
            rounding; with fewer, as an estimate of it that needs training. With router "fitted"
            the experts are groups of units that are active together (`headwise.fit_experts`), and
            the units of the shared expert count, too. **Source**: LLaMA-MoE, arXiv 2406.16554
            (slices); sparse upcycling, arXiv 2212.05055.
    """

    num_experts: Count
    top_k: Count
    expert_dim: Count
    normalize_top_k: bool = True
    shared_expert_dim: Index | None = None
    inner_residual: bool = False
    activation: Activation = "silu"
    glu: bool = True
    router: ExpertRouterName = "linear"
    balance_coefficient: Weight = 0.01
    z_loss_coefficient: Weight = 0.0
    experts_from: ExpertsFrom = "random"
    scores: TokenScores = "softmax"
    bias_rate: Weight = 0.0
    balance_form: BalanceForm = "scaled"
    balance_scope: BalanceScope = "process"

    def __post_init__(self) -> None:
        check_fields(self)
        # The layer checks its own arguments; on the meta device it costs no memory to build one. A
        # compiled model's config was checked before, and layers are not built in a graph.
        if not torch.compiler.is_compiling():
            with torch.device("meta"):
                self.build(getattr(self, "num_heads", 1))
        if self.router == "fitted" and self.experts_from != "mlp":
            raise ValueError(
                f"experts_from is {self.experts_from!r}; with router 'fitted' it must be 'mlp'"
            )
        if self.experts_from == "mlp":
            self._check_is_an_mlp_in_parts()

    @property
    def num_shared(self) -> int:
        """How many experts' width the shared expert of a fitted mixture has."""
        return (self.shared_expert_dim or 0) // self.expert_dim

    def _check_is_an_mlp_in_parts(self) -> None:
        fitted = self.router == "fitted"
        router = "fitted" if fitted else "linear"
        needed = {"glu": True, "router": router, "inner_residual": False}
        for field, value in needed.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; with experts_from 'mlp' it must be "
                    f"{value!r}"
                )
        if fitted and getattr(self, "num_heads", 1) != 1:
            raise ValueError("router is 'fitted'; in an MHMoEConfig it must be 'linear'")
        if not fitted and self.shared_expert_dim:
            raise ValueError(
                f"shared_expert_dim is {self.shared_expert_dim}; with experts_from 'mlp' it must "
                "be None, or the router 'fitted'"
            )
        if fitted and self.num_shared * self.expert_dim != (self.shared_expert_dim or 0):
            raise ValueError(
                f"shared_expert_dim is {self.shared_expert_dim}; with router 'fitted' it must be a "
                f"multiple of expert_dim = {self.expert_dim}"
            )
        if self.scores == "sigmoid" and not self.normalize_top_k:
            raise ValueError(
                "normalize_top_k is False; with scores 'sigmoid' and experts_from 'mlp' it must be "
                "True, or the sizes of the experts' weights would not be a mean's"
            )

    @checked
    def fine_grained(self, parts: Count) -> Self:
        """The same mixture with every expert cut into that many, and as many times the top_k.

        Parameters and FLOPs stay, the router's aside; the choice is finer. In `MHMoEConfig` it is
        each sub-token's.

        **Source**: fine-grained expert segmentation, DeepSeekMoE, arXiv 2401.06066, section 3.1.

        Raises:
            ValueError: If parts does not divide expert_dim.
        """
        if self.expert_dim % parts:
            raise ValueError(f"parts is {parts}; it must divide expert_dim = {self.expert_dim}")
        return dataclasses.replace(
            self,
            num_experts=self.num_experts * parts,
            top_k=self.top_k * parts,
            expert_dim=self.expert_dim // parts,
        )

    def build(self, dim: int) -> MoE:
        """The layer for tokens of that width."""
        fields = dataclasses.asdict(self)
        kind = MHMoE if isinstance(self, MHMoEConfig) else MoE
        return kind(dim, **{k: v for k, v in fields.items() if k not in _NOT_OF_THE_LAYER})


_NOT_OF_THE_LAYER = (
    "balance_coefficient", "z_loss_coefficient", "balance_form", "balance_scope", "experts_from",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MHMoEConfig(MoEConfig):
    """Multi-Head Mixture-of-Experts in place of a model's MLP. Fields are `MHMoE`'s.

    With `experts_from="mlp"` a slice has num_heads experts, one for each part of the token, so
    num_experts / num_heads * expert_dim must be the MLP's hidden width. With one head and every
    expert on the layer starts as the MLP. With more heads no output is kept, because a hidden unit
    sees only a part of the token; it is a start for training (stories260k, 2 heads, 60 steps of
    distillation: perplexity 8.6, from random experts 13.5).
    """

    num_heads: Count
    bias: bool = False
    head_layer: bool = True
    merge_layer: bool = True

    @classmethod
    def first_version(cls, **fields: Any) -> "MHMoEConfig":
        """MH-MoE as first published; the defaults are those of its second paper.

            u = split(W_head x + b);   o = u + sum_k p_k expert_k(u);   y = W_merge concat(o) + b'

        Against the second: biases in head and merge layer, the sub-token added to what its experts
        say (`inner_residual`), raw weights (`normalize_top_k`), experts of two matrices with GELU
        (`glu`, `activation`), and the balance loss of the first choice (`balance_form`).

        **Source**: arXiv 2404.15045, Eq. 1 to 6; what the paper leaves open is as in its released
        code. That code has no inner residual, and with X-MoE's router (`router="cosine"`)
        normalised weights.
        **Deviates**: experts have neither biases nor a norm inside, and no token is dropped.

        Args:
            fields: Of `MHMoEConfig`; they go before what this sets.
        """
        first: dict[str, Any] = {
            "bias": True, "inner_residual": True, "normalize_top_k": False,
            "glu": False, "activation": "gelu", "balance_form": "first_choice",
        }  # fmt: skip
        return cls(**first | fields)

    def _check_is_an_mlp_in_parts(self) -> None:
        super()._check_is_an_mlp_in_parts()
        if self.num_experts % self.num_heads:
            raise ValueError(
                f"num_experts is {self.num_experts}; with experts_from 'mlp' it must be a multiple "
                f"of num_heads = {self.num_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class FittedExperts:
    """What `headwise.fit_experts` gives, and `convert(mlp=)` takes.

    Attributes:
        config: The mixture.
        orders: The hidden units of each layer's MLP, by the layer's number: those of the shared
            expert, then expert by expert.
        routers: weight and bias of the router of each layer, and gain, of which the first are the
            shared expert's; none where every expert is on.
        layers: The layers that were fitted to; None for all.
    """

    config: MoEConfig
    orders: Mapping[int, Tensor] = dataclasses.field(repr=False)
    routers: Mapping[int, Mapping[str, Tensor]] = dataclasses.field(repr=False)
    layers: tuple[int, ...] | None = None

    def check_fits(self, layers: Sequence[int]) -> None:
        """Raises ValueError if they were fitted to other layers."""
        if set(layers) != set(self.orders):
            raise ValueError(
                f"mlp was fitted to layers {sorted(self.orders)}; layers and every must give "
                f"these, not {sorted(layers)}"
            )
