"""What `convert` takes: frozen descriptions of the layers that go into a transformers model."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch

from headwise.nn import Budget, HeadBudget, HeadRouter, MHMoE, MoE
from headwise.nn.mh_moe import ExpertRouterName
from headwise.nn.moh import HeadRouterName, check_head_router, head_router
from headwise.ops.activations import Activation
from headwise.ops.balance import BalanceForm, BalanceScope
from headwise.ops.choice import check_choice
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores, TokenScores

ExpertsFrom = Literal["random", "mlp"]
Ternary = Literal["no", "trained", "packed"]
OfDepth = Callable[[int, int], Budget]


@dataclass(frozen=True, kw_only=True)
class MoHConfig:
    """Mixture-of-Head attention in place of a model's attention.

    A budget is a count of heads or a share of all heads. `shared` and `active` take one for every
    layer; a sequence with one for each layer; or a function of (layer, number of layers), which
    `convert` resolves. A layer of `shared` may also be the list of the heads themselves, ascending:
    `headwise.calibrate` makes such lists.

    Attributes:
        shared: Heads that are always on; the first ones, unless they are named.
        active: Heads that a token switches on, shared ones included.
        router: "two_stage" (learned), "one_stage" (its ablation: shared heads at 1, no stages) or
            "query_norm" (without parameters, for pretrained models).
        mode: Formulas of a learned router: "released" or "paper".
        scores: A learned router's scores of routed heads: "softmax", "sparsemax" or "sigmoid".
        balance_coefficient: Factor of the balance loss in the training loss (the paper's beta).
        route_groups: The query heads that share a key head are on or off together, so that decoding
            reads the cache of those groups only that are on. shared and active still count query
            heads and must be whole groups (a share rounds to them).
        router_std: Deviation with which a learned router starts. With 0 every head that is on has
            a gate of 1 (mode "released"), so that a pretrained model starts with its heads as they
            were, the first ones chosen; the balance loss then spreads the choice.
    """

    shared: Budget | Sequence[Budget | Sequence[int]] | OfDepth = 0.4
    active: Budget | Sequence[Budget] | OfDepth = 0.75
    router: HeadRouterName = "two_stage"
    mode: HeadMode = "released"
    balance_coefficient: float = 0.01
    route_groups: bool = False
    router_std: float = 0.02
    scores: HeadScores = "softmax"

    def __post_init__(self) -> None:
        for field in ("shared", "active"):
            value: Any = getattr(self, field)
            if isinstance(value, list | tuple):
                value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
                object.__setattr__(self, field, value)
            for budget in value if isinstance(value, tuple) else (value,):
                named = field == "shared" and isinstance(value, tuple) and isinstance(budget, tuple)
                if not (named or callable(budget)):
                    _check_budget(field, budget)
        shared, active = cast(tuple[Any, Any], (self.shared, self.active))
        if type(shared) is type(active) in (int, float) and shared > active:
            raise ValueError(f"shared is {shared}, more than active = {active}")
        check_head_router(self.router, mode=self.mode, scores=self.scores)
        _check_coefficient("balance_coefficient", self.balance_coefficient)
        _check_coefficient("router_std", self.router_std)

    def resolve(self, num_layers: int) -> "MoHConfig":
        """The same with functions of depth evaluated.

        Raises:
            ValueError: If a sequence has not one budget for each layer.
        """
        changes: dict[str, Any] = {}
        for field in ("shared", "active"):
            value: Any = getattr(self, field)
            if callable(value):
                changes[field] = tuple(value(layer, num_layers) for layer in range(num_layers))
            elif isinstance(value, tuple) and len(value) != num_layers:
                raise ValueError(
                    f"{field} has budgets of {len(value)} layers; the model has {num_layers}"
                )
        return dataclasses.replace(self, **changes)

    def build_router(
        self, layer: int, *, dim: int, num_heads: int, num_kv_heads: int | None = None
    ) -> HeadRouter:
        """The router of a layer, for an attention of that width; num_kv_heads default to num_heads.

        Raises:
            ValueError: If the layer's budget does not fit its heads, naming the layer.
        """
        shared, active = self._of_layer(self.shared, layer), self._of_layer(self.active, layer)
        try:
            budget = HeadBudget.resolve(
                num_heads,
                shared=shared,
                active=active,
                num_groups=num_kv_heads if self.route_groups else None,
            )
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None
        return head_router(
            self.router, dim, budget, mode=self.mode, scores=self.scores, std=self.router_std
        )

    @staticmethod
    def _of_layer(budget: Any, layer: int) -> Any:
        return budget[layer] if isinstance(budget, tuple) else budget


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
            rounding; with fewer, as an estimate of it that needs training. **Source**: LLaMA-MoE,
            arXiv 2406.16554 (slices); sparse upcycling, arXiv 2212.05055.
    """

    num_experts: int
    top_k: int
    expert_dim: int
    normalize_top_k: bool = True
    shared_expert_dim: int | None = None
    inner_residual: bool = False
    activation: Activation = "silu"
    glu: bool = True
    router: ExpertRouterName = "linear"
    balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    experts_from: ExpertsFrom = "random"
    scores: TokenScores = "softmax"
    bias_rate: float = 0.0
    balance_form: BalanceForm = "scaled"
    balance_scope: BalanceScope = "process"

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "expert_dim"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field} is {value!r}; it must be an int")
        # The layer knows what it takes; on the meta device it costs nothing to ask.
        with torch.device("meta"):
            self.build(getattr(self, "num_heads", 1))
        _check_coefficient("balance_coefficient", self.balance_coefficient)
        _check_coefficient("z_loss_coefficient", self.z_loss_coefficient)
        check_choice("balance_form", self.balance_form, BalanceForm)
        check_choice("balance_scope", self.balance_scope, BalanceScope)
        check_choice("experts_from", self.experts_from, ExpertsFrom)
        if self.experts_from == "mlp":
            self._check_is_an_mlp_in_slices()

    def _check_is_an_mlp_in_slices(self) -> None:
        needed = {"glu": True, "router": "linear", "inner_residual": False}
        for field, value in needed.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; with experts_from 'mlp' it must be "
                    f"{value!r}"
                )
        if self.shared_expert_dim:
            raise ValueError(
                f"shared_expert_dim is {self.shared_expert_dim}; with experts_from 'mlp' it must "
                "be None"
            )
        if self.scores == "sigmoid" and not self.normalize_top_k:
            raise ValueError(
                "normalize_top_k is False; with scores 'sigmoid' and experts_from 'mlp' it must be "
                "True, or the sizes of the experts' weights would not be a mean's"
            )

    def fine_grained(self, parts: int) -> Self:
        """The same mixture with every expert cut into that many, and as many times the top_k.

        Parameters and FLOPs stay, the router's aside; the choice is finer. In `MHMoEConfig` it is
        each sub-token's.

        **Source**: fine-grained expert segmentation, DeepSeekMoE, arXiv 2401.06066, section 3.1.

        Raises:
            ValueError: If parts does not divide expert_dim.
        """
        if parts < 1 or self.expert_dim % parts:
            raise ValueError(f"parts is {parts}; it must divide expert_dim = {self.expert_dim}")
        return dataclasses.replace(
            self,
            num_experts=self.num_experts * parts,
            top_k=self.top_k * parts,
            expert_dim=self.expert_dim // parts,
        )

    def build(self, dim: int) -> MHMoE:
        """The layer for tokens of that width."""
        return MoE(dim, **self._layer_fields())

    def _layer_fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for name in _NOT_OF_THE_LAYER:
            del fields[name]
        return fields


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

    num_heads: int
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

    def _check_is_an_mlp_in_slices(self) -> None:
        super()._check_is_an_mlp_in_slices()
        if self.num_experts % self.num_heads:
            raise ValueError(
                f"num_experts is {self.num_experts}; with experts_from 'mlp' it must be a multiple "
                f"of num_heads = {self.num_heads}"
            )

    def build(self, dim: int) -> MHMoE:
        """The layer for tokens of that width."""
        return MHMoE(dim, **self._layer_fields())


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that `convert` did to a model; config.json keeps it under the key "headwise".

    Attributes:
        attention: Replaces the attention of every layer; None leaves it.
        mlp: Replaces the MLP of every `every`-th layer; None leaves it.
        every: 1 for each layer; 2 for layers 1, 3, 5, … counted from 0, and so on.
        ternary: Whether the linear maps and experts of every layer are ternary: "no"; "trained",
            with weights that every forward makes ternary; "packed", in 2 bits for inference.
    """

    attention: MoHConfig | None = None
    mlp: MoEConfig | None = None
    every: int = 1
    ternary: Ternary = "no"

    def __post_init__(self) -> None:
        check_choice("ternary", self.ternary, Ternary)
        if self.attention is None and self.mlp is None and self.ternary == "no":
            raise ValueError(
                "attention and mlp are both None; give at least one to convert, or ternary=True"
            )
        for field, kind in (("attention", MoHConfig), ("mlp", MoEConfig)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{field} is {value!r}; it must be a headwise.{kind.__name__}")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; the mlp's type is kept under "kind"."""
        return {
            # A reader of format 1 would not see that a model is ternary, and load it as it is not.
            "format": 1 if self.ternary == "no" else 2,
            "attention": self.attention and dataclasses.asdict(self.attention),
            "mlp": self.mlp and {"kind": _kind(self.mlp), **dataclasses.asdict(self.mlp)},
            "every": self.every,
            "ternary": self.ternary,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Conversion":
        """The inverse of `to_dict`.

        Raises:
            ValueError: If the format is newer than this version of headwise reads, or fields are
                missing or unknown.
        """
        try:
            if fields["format"] > FORMAT_VERSION:
                raise ValueError(
                    f"the model has headwise format {fields['format']}, this version reads up to "
                    f"{FORMAT_VERSION}; upgrade with `pip install --upgrade headwise`"
                )
            attention, mlp = fields["attention"], fields["mlp"]
            return cls(
                attention=attention and MoHConfig(**attention),
                mlp=mlp and _mlp_from_dict(**mlp),
                every=fields["every"],
                ternary=fields.get("ternary", "no"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json's 'headwise' is not understood: {error!r}") from error


FORMAT_VERSION = 2


def _kind(mlp: MoEConfig) -> str:
    return "mh_moe" if isinstance(mlp, MHMoEConfig) else "moe"


def _mlp_from_dict(kind: str, **fields: Any) -> MoEConfig:
    return {"moe": MoEConfig, "mh_moe": MHMoEConfig}[kind](**fields)


def _check_budget(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} is {value!r}; it must be a count or a share")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{field} is {value}; a count of heads must be at least 0")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(f"{field} is {value}; a share must lie in 0.0..1.0")


def _check_coefficient(field: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{field} is {value}; it must be at least 0")
