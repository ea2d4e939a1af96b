"""All that `convert` does to a model, how config.json keeps it, and what such a model can do."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.hf.expert_configs import MHMoEConfig, MoEConfig
from headwise.hf.head_configs import MoHConfig
from headwise.hf.reading import StrictlyLoaded
from headwise.ops import HeadRouting, Routing, balance_loss, router_z_loss
from headwise.ops.fields import Count, Index, check_fields

Ternary = Literal["no", "trained", "packed"]
FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that `convert` did to a model; config.json keeps it under the key "headwise".

    Attributes:
        attention: Replaces the attention of every layer; None leaves it.
        mlp: Replaces the MLP of every `every`-th of these layers; None leaves it.
        layers: Which layers, counted from 0, ascending; None for all.
        every: 1 for each of them; 2 for the second, fourth, … of them, and so on. Of all layers
            these are 1, 3, 5, …
        ternary: Whether the linear maps and experts of every layer are ternary: "no"; "trained",
            with weights that every forward makes ternary; "packed", in 2 bits for inference.
    """

    attention: MoHConfig | None = None
    mlp: MoEConfig | None = None
    layers: Sequence[Index] | None = None
    every: Count = 1
    ternary: Ternary = "no"

    def __post_init__(self) -> None:
        if isinstance(self.layers, range):
            object.__setattr__(self, "layers", tuple(self.layers))
        check_fields(self)
        if self.attention is None and self.mlp is None and self.ternary == "no":
            raise ValueError(
                "attention and mlp are both None; give at least one to convert, or ternary=True"
            )
        if self.layers is not None:
            if not self.layers or len(set(self.layers)) < len(self.layers):
                raise ValueError(
                    f"layers is {list(self.layers)}; it must name at least one layer, each once"
                )
            object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def layers_of(self, num_layers: int) -> tuple[list[int], list[int]]:
        """The layers whose attention is converted, and those whose MLP is, in a model of so many.

        Raises:
            ValueError: If the model lacks a layer that `layers` names, or `every` exceeds them.

        Example (worked by hand): in a model of 6 layers, layers (1, 2, 4, 5) and every 2 convert
        the attention of layers 1, 2, 4 and 5, and the MLPs of layers 2 and 5.
        """
        layers = list(range(num_layers) if self.layers is None else self.layers)
        if beyond := [str(layer) for layer in layers if layer >= num_layers]:
            raise ValueError(
                f"layers has {', '.join(beyond)}; the model has {num_layers} layers, so each must "
                f"lie in 0..{num_layers - 1}"
            )
        of_mlp = layers[self.every - 1 :: self.every]
        if self.mlp is not None and not of_mlp:
            which = "the model has" if self.layers is None else "layers names"
            raise ValueError(
                f"every is {self.every}, but {which} {len(layers)} layers; it must be at most "
                f"{len(layers)}"
            )
        return layers if self.attention else [], of_mlp if self.mlp else []

    @property
    def balances_load(self) -> bool:
        """Whether training is to balance the routers: by losses, or by biases of experts."""
        heads, experts = self.attention, self.mlp
        factors = [heads.balance_coefficient] if heads else []
        if experts:
            factors += [experts.balance_coefficient, experts.z_loss_coefficient, experts.bias_rate]
        return any(factors)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can keep; the mlp's type stands under "kind"."""
        # A reader of an older format would not see that a model is ternary, or converted in part.
        kind = "mh_moe" if isinstance(self.mlp, MHMoEConfig) else "moe"
        in_part = {} if self.layers is None else {"format": 3, "layers": list(self.layers)}
        return {
            "format": 1 if self.ternary == "no" else 2,
            "attention": self.attention and dataclasses.asdict(self.attention),
            "mlp": self.mlp and {"kind": kind, **dataclasses.asdict(self.mlp)},
            "every": self.every,
            "ternary": self.ternary,
            **in_part,
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
                    f"the model was saved by a newer headwise, in format {fields['format']}; this "
                    f"version reads up to {FORMAT_VERSION}; upgrade with `pip install -U headwise`"
                )
            attention, mlp = fields["attention"], fields["mlp"]
            return cls(
                attention=attention and MoHConfig(**_FIRST_DEFAULTS | attention),
                mlp=mlp and _MLPS[mlp["kind"]](**{k: x for k, x in mlp.items() if k != "kind"}),
                layers=fields.get("layers"),
                every=fields["every"],
                ternary=fields.get("ternary", "no"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json's 'headwise' is not understood: {error!r}") from error


class Converted(StrictlyLoaded):
    """Mixed into the class of a converted model: what was converted, its loss, strict loading."""

    config: Any

    @property
    def conversion(self) -> Conversion:
        """What `headwise.convert` made of this model."""
        return Conversion.from_dict(self.config.headwise)

    @property
    def original_class(self) -> Any:
        """The class that the model had before."""
        # Sharding puts a class of its own before the model's.
        kinds = type(self).__mro__
        return next(k.__bases__[1] for k in kinds if issubclass(k.__bases__[0], Converted))

    def routing_loss(self, routings: Mapping[str, Routing]) -> Tensor:
        """The balance losses (and z-losses) of a forward, weighted as configured.

        Averaged over the layers of a kind: over attentions, and over mixtures of experts.

        Args:
            routings: What `headwise.record_routing` saw in a forward.
        """
        conversion: Any = self.conversion
        mlp = conversion.mlp
        heads, experts = [], []
        for routing in routings.values():
            if isinstance(routing, HeadRouting):
                heads.append(conversion.attention.balance_coefficient * balance_loss(routing))
            else:
                z_loss = mlp.z_loss_coefficient * router_z_loss(routing)
                balance = balance_loss(routing, form=mlp.balance_form, scope=mlp.balance_scope)
                experts.append(mlp.balance_coefficient * balance + z_loss)
        kinds = [torch.stack(losses).mean() for losses in (heads, experts) if losses]
        return torch.stack(kinds).sum()


def is_of_diffusers(model: Any) -> bool:
    """Whether the model's class comes from diffusers, found out without importing that."""
    return any(kind.__module__.split(".")[0] == "diffusers" for kind in type(model).__mro__)


# Of fields that the first saved models may lack.
_FIRST_DEFAULTS = {"router": "two_stage", "router_std": 0.02}
_MLPS = {"moe": MoEConfig, "mh_moe": MHMoEConfig}
