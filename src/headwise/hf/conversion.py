"""All that `convert` does to a model, and how config.json keeps it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from headwise.hf.expert_configs import MHMoEConfig, MoEConfig
from headwise.hf.head_configs import MoHConfig
from headwise.ops.fields import Count, check_fields

Ternary = Literal["no", "trained", "packed"]
FORMAT_VERSION = 2


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
    every: Count = 1
    ternary: Ternary = "no"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attention is None and self.mlp is None and self.ternary == "no":
            raise ValueError(
                "attention and mlp are both None; give at least one to convert, or ternary=True"
            )

    @property
    def balances_load(self) -> bool:
        """Whether training is to balance the routers: by losses, or by biases of experts."""
        heads, experts = self.attention, self.mlp
        factors = [heads.balance_coefficient] if heads else []
        if experts:
            factors += [experts.balance_coefficient, experts.z_loss_coefficient, experts.bias_rate]
        return any(factors)

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
                attention=attention and MoHConfig(**_FIRST_DEFAULTS | attention),
                mlp=mlp and _mlp_from_dict(**mlp),
                every=fields["every"],
                ternary=fields.get("ternary", "no"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json's 'headwise' is not understood: {error!r}") from error


# Of fields that the first saved models may lack.
_FIRST_DEFAULTS = {"router": "two_stage", "router_std": 0.02}


def _kind(mlp: MoEConfig) -> str:
    return "mh_moe" if isinstance(mlp, MHMoEConfig) else "moe"


def _mlp_from_dict(kind: str, **fields: Any) -> MoEConfig:
    return {"moe": MoEConfig, "mh_moe": MHMoEConfig}[kind](**fields)
