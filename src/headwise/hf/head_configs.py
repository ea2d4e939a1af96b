"""A frozen description of Mixture-of-Head attention, for `convert(attention=)`."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor

from headwise.nn import ActiveBudget, Budget, FittedRouter, HeadBudget, HeadRouter, OutputGateRouter
from headwise.nn.moh import HeadRouterName, check_head_router, head_router
from headwise.ops.fields import Index, Weight, check_fields
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores

OfDepth = Callable[[int, int], Budget]
# Of models that are converted: those of a layer, and those that need a model around them.
RouterName = Literal[HeadRouterName, "fitted", "output_gate"]
_OF_MODELS: dict[str, Callable[[int, HeadBudget], HeadRouter]] = {
    "fitted": FittedRouter,
    "output_gate": lambda _, budget: OutputGateRouter(budget),
}
_SHARED: dict[str, Budget] = {"fitted": 0, "output_gate": 0, "query_norm": 0.5}


@dataclass(frozen=True, kw_only=True)
class MoHConfig:
    """Mixture-of-Head attention in place of a model's attention.

    A budget is a count of heads or a share of all heads. `shared` and `active` are one budget for
    all layers, a sequence with one for each layer, or a function of (layer, number of layers) that
    returns one. In a sequence, `shared` may also list the heads themselves, ascending:
    `headwise.calibrate` makes such lists.

    Attributes:
        shared: Heads that are always on; the first ones, unless they are named. Default: none with
            routers "fitted" and "output_gate", which find by themselves what is always needed; 0.5
            of them with "query_norm", as in the released MoH-LLaMA3-8B; otherwise 0.4.
        active: Heads that a token switches on, shared ones included.
        router: "query_norm" (without parameters, for pretrained models), "fitted" (for pretrained
            models and a little text: `headwise.fit`), "output_gate" (for models whose attention
            multiplies heads by gates already, as Lfm3, Step3p7, Laguna, Qwen3-Next and Qwen3.5 do:
            the largest stay), "two_stage" (learned, for models trained from scratch) or
            "one_stage" (its ablation, shared heads at 1).
        mode: Formulas of a learned router: "released" or "paper".
        scores: A learned router's scores of routed heads: "softmax", "sparsemax" or "sigmoid".
        balance_coefficient: Factor of the balance loss in the training loss (the paper's beta).
        route_groups: The query heads that share a key head are on or off together. Decoding then
            reads the cache of the groups that are on, and no other. shared and active still count
            query heads; they must be whole groups, and a share rounds to whole groups.
        router_std: Deviation with which a learned router starts. The paper's models, which are
            trained from scratch, start with 0.02. With 0 every head that is on has a gate of 1
            (mode "released"): a pretrained model starts with its heads as they were. Its first
            routed heads are then on for every token, until the balance loss spreads them.
    """

    shared: Budget | Sequence[Budget | Sequence[Index]] | OfDepth | None = None
    active: ActiveBudget | Sequence[ActiveBudget] | OfDepth = 0.75
    router: RouterName = "query_norm"
    mode: HeadMode = "released"
    balance_coefficient: Weight = 0.01
    route_groups: bool = False
    router_std: Weight = 0.0
    scores: HeadScores = "softmax"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shared is None:
            object.__setattr__(self, "shared", _default_shared(self.router))
        for name in ("shared", "active"):
            value: Any = getattr(self, name)
            if callable(value):
                _check_takes_depth(name, value)
            elif isinstance(value, list | tuple):
                value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
                object.__setattr__(self, name, value)
        shared, active = cast(tuple[Any, Any], (self.shared, self.active))
        if type(shared) is type(active) in (int, float) and shared > active:
            raise ValueError(
                f"shared is {shared}, more than active = {active}, which counts shared heads too; "
                f"lower shared or raise active{self._where_from(shared)}"
            )
        check_head_router(self.router, scores=self.scores)

    def resolve(self, num_layers: int) -> "MoHConfig":
        """The same with functions of depth evaluated.

        Raises:
            ValueError: If a sequence has not one budget for each layer.
        """
        changes: dict[str, Any] = {}
        for name in ("shared", "active"):
            value: Any = getattr(self, name)
            if callable(value):
                changes[name] = tuple(value(layer, num_layers) for layer in range(num_layers))
            elif isinstance(value, tuple) and len(value) != num_layers:
                raise ValueError(
                    f"{name} has budgets of {len(value)} layers; the model has {num_layers}"
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
                names=("shared", "active"),
            )
        except ValueError as error:
            hint = self._where_from(shared) if str(error).startswith("shared") else ""
            raise ValueError(f"layer {layer}: {error}{hint}") from None
        if build := _OF_MODELS.get(self.router):
            return build(dim, budget)
        return head_router(
            cast(HeadRouterName, self.router),
            dim,
            budget,
            mode=self.mode,
            scores=self.scores,
            std=self.router_std,
        )

    def _where_from(self, shared: Any) -> str:
        default = _default_shared(self.router)
        return f" (by default shared is {default})" if shared == default != 0 else ""

    @staticmethod
    def _of_layer(budget: Any, layer: int) -> Any:
        return budget[layer] if isinstance(budget, tuple) else budget


def _default_shared(router: RouterName) -> Budget:
    return _SHARED.get(router, 0.4)


def _check_takes_depth(name: str, budget: Callable[..., Any]) -> None:
    try:
        inspect.signature(budget).bind(0, 1)
    except TypeError as error:
        raise ValueError(
            f"{name} is a function that does not take (layer, number of layers): {error}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class FittedHeads:
    """What `headwise.fit` gives, and `convert(attention=)` takes.

    Attributes:
        config: With the budget of each layer.
        routers: The parameters of the router of each layer, by its number; none where all heads are
            on.
        layers: The layers that were fitted to; None for all.
    """

    config: MoHConfig
    routers: Mapping[int, Mapping[str, Tensor]] = field(repr=False)
    layers: tuple[int, ...] | None = None

    def fill(self, routers: Mapping[int, HeadRouter]) -> None:
        """Give routers the parameters that were fitted.

        Raises:
            ValueError: If they were fitted to other layers, or to a model of other widths.
        """
        if set(routers) != set(self.routers):
            raise ValueError(
                f"attention was fitted to layers {sorted(self.routers)}; layers must be these, not "
                f"{sorted(routers)}"
            )
        for layer, router in routers.items():
            fitted = {name: tuple(x.shape) for name, x in self.routers[layer].items()}
            needed = {name: tuple(x.shape) for name, x in router.named_parameters()}
            if fitted != needed:
                raise ValueError(
                    f"attention was fitted to another model: in layer {layer} its router has "
                    f"{fitted}, and this model's {needed}"
                )
        for layer, router in routers.items():
            router.load_state_dict(self.routers[layer])
