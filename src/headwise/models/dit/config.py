"""Sizes of diffusion transformers: their configuration, and those that are published."""

from typing import Annotated, Any

from headwise.models.own import OwnConfig
from headwise.nn import ActiveBudget, Budget, HeadBudget
from headwise.ops.fields import Count, Positive, Range, Weight, check_fields

# Layers, width, heads of the dense models: DiT, arXiv 2212.09748, Table 1.
_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}

# MoH, arXiv 2410.11842: so many layers with heads, shared ones, and routed ones that a token keeps.
_BUDGETS = {
    "s-90": ((8, 6, 3, 2), (4, 6, 6, 0)),
    "s-75": ((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
    "b-90": ((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    "b-75": ((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)),
    "l-90": ((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    "l-75": ((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    "xl-90": ((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    "xl-75": ((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
}

_TEST: dict[str, Any] = {
    "input_size": 8, "in_channels": 1, "num_hidden_layers": 4, "hidden_size": 96, "num_heads": 8,
    "num_labels": 10,
}  # fmt: skip


def _dense(size: str) -> dict[str, Any]:
    layers, width, heads = _SIZES[size]
    return {"num_hidden_layers": layers, "hidden_size": width, "num_heads": heads}


def _routed(name: str) -> dict[str, Any]:
    """The dense model with heads of the same width, as many in each layer as MoH gives it."""
    dense = _dense(name.split("-")[0])
    rows = [row for layers, *row in _BUDGETS[name] for _ in range(layers)]
    return dense | {
        "head_dim": dense["hidden_size"] // dense["num_heads"],
        "num_heads": [heads for heads, _, _ in rows],
        "shared_heads": [shared for _, shared, _ in rows],
        "active_heads": [shared + kept for _, shared, kept in rows],
    }


PRESETS: dict[str, dict[str, Any]] = {
    **{f"dit-{size}": _dense(size) for size in _SIZES},
    **{f"moh-dit-{name}": _routed(name) for name in _BUDGETS},
    "dit-test": _TEST,
    "moh-dit-test": _TEST | {"shared_heads": 4, "active_heads": 6},
}


class DiTConfig(OwnConfig):
    """Sizes of a `DiT`. The defaults are those of the dense DiT-S/2.

    Attributes:
        input_size: Side of the images or latents; patch_size divides it.
        patch_size: Side of a patch.
        in_channels: Of the images or latents.
        hidden_size: Width D; a multiple of 4.
        num_heads: Heads of every layer, or of each. Divides hidden_size unless head_dim is given.
        head_dim: Channels of a head. Default: hidden_size / num_heads.
        num_hidden_layers: Blocks.
        mlp_ratio: Width of an MLP's hidden layer over D.
        class_dropout: Share of labels that training replaces by the null class, 0 up to 1. With 0
            there is no null class, hence no guidance.
        num_labels: Classes; the null class has this index. As everywhere in transformers 2, or as
            many as id2label has; 1000 in the published presets.
        learn_sigma: The output has 2·in_channels channels: noise, and what its variance is.
        shared_heads: Heads that are always on, in every layer or in each: counts or shares. None
            for the dense model.
        active_heads: Heads that a token switches on, shared ones included. None for the dense
            model. A layer whose heads are all shared routes none, but weighs them.
        balance_coefficient: Weight of the balance losses in `DiT.routing_loss`.
        router_std: Deviation with which routers start; None is Xavier's, as in the released code.

    Raises:
        ValueError: If sizes do not fit, naming the field.
    """

    model_type = "headwise_dit"
    presets = PRESETS

    input_size: Count = 32
    patch_size: Count = 2
    in_channels: Count = 4
    hidden_size: Count = 384
    num_heads: Count | list[Count] | tuple[Count, ...] = 6
    head_dim: Count | None = None
    num_hidden_layers: Count = 12
    mlp_ratio: Positive = 4.0
    class_dropout: Annotated[float, Range(0, below=1)] = 0.1
    learn_sigma: bool = True
    shared_heads: Budget | list[Budget] | tuple[Budget, ...] | None = None
    active_heads: ActiveBudget | list[ActiveBudget] | tuple[ActiveBudget, ...] | None = None
    balance_coefficient: Weight = 0.01
    router_std: Weight | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # As they come back from JSON.
        for name in ("num_heads", "shared_heads", "active_heads"):
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        check_fields(self)
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}; it must divide input_size = {self.input_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be a multiple of 4")
        if (self.shared_heads is None) != (self.active_heads is None):
            raise ValueError(
                f"shared_heads is {self.shared_heads} and active_heads {self.active_heads}; give "
                "both, or neither for the dense model"
            )
        for heads in self._per_layer("num_heads"):
            if self.head_dim is None and self.hidden_size % heads:
                raise ValueError(
                    f"num_heads is {heads!r}; it must divide hidden_size = {self.hidden_size}, or "
                    "head_dim be given"
                )
        _ = self.budgets

    @property
    def budgets(self) -> tuple[HeadBudget | None, ...]:
        """Of each layer: its heads, shared and active ones; None for a dense layer."""
        if self.active_heads is None:
            return (None,) * self.num_hidden_layers
        layers = ("num_heads", "shared_heads", "active_heads")
        return tuple(
            HeadBudget.resolve(heads, shared=shared, active=active)
            for heads, shared, active in zip(*map(self._per_layer, layers), strict=True)
        )

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Heads of each layer."""
        return self._per_layer("num_heads")

    @property
    def num_patches(self) -> int:
        """Tokens of an image, T."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def _per_layer(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, list):
            return (value,) * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(value)} entries; it must have num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        return tuple(value)
