"""Sizes of a TransNeXt and of a MoH-ViT: checked, and the published ones by name."""

from typing import Annotated, Any

from transformers.backbone_utils import BackboneConfigMixin

from headwise.models.own import OwnConfig
from headwise.nn import HeadBudget
from headwise.ops.fields import Count, Index, Positive, Range, Weight, check_fields

Counts = tuple[Count, ...] | list[Count]
Rate = Annotated[float, Range(0, below=1)]

_TINY = {"hidden_sizes": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.25}
_SMALL = _TINY | {"depths": (5, 5, 22, 5), "drop_path_rate": 0.45}
_BASE = {
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (5, 5, 23, 5),
    "num_heads": (4, 8, 16, 32),
    "drop_path_rate": 0.6,
}
_TEST = {
    "image_size": 32,
    "patch_size": 2,
    "hidden_sizes": (32, 64, 128),
    "depths": (2, 2, 2),
    "num_heads": (4, 4, 8),
    "mlp_ratios": (4, 4, 4),
    "sr_ratios": (4, 2, 1),
    "drop_path_rate": 0.0,
    "num_labels": 10,
}

PRESETS: dict[str, dict[str, Any]] = {
    "transnext-micro": {},
    "transnext-tiny": _TINY,
    "transnext-small": _SMALL,
    "transnext-base": _BASE,
    "moh-vit-s-75": _SMALL | {"shared_heads": (3, 6, 3, 4), "active_heads": (3, 6, 9, 16)},
    "moh-vit-s-80": _SMALL | {"shared_heads": (3, 6, 3, 8), "active_heads": (3, 6, 9, 20)},
    "moh-vit-b-50": _BASE | {"shared_heads": (2, 2, 2, 4), "active_heads": (4, 6, 8, 12)},
    "moh-vit-b-75": _BASE | {"shared_heads": (4, 8, 4, 5), "active_heads": (4, 8, 12, 21)},
    "test": _TEST,
    "moh-test": _TEST | {"shared_heads": (2, 2, 3), "active_heads": (3, 3, 6)},
}


class TransNeXtConfig(BackboneConfigMixin, OwnConfig):
    """Sizes of a TransNeXt or MoH-ViT. The defaults are those of "transnext-micro".

    Tuples have an entry for each stage; there may be any number of stages. Stage i, from 0, sees a
    map of image size / (patch_size · 2^i), rounded up.

    **Source**: TransNeXt, arXiv 2311.17132; MoH, arXiv 2410.11842, for the heads of MoH-ViT.

    Attributes:
        image_size: Side of the images, in pixels. A model takes other sizes too.
        patch_size: Stride of the first patch embedding, in pixels.
        num_channels: Of the images.
        hidden_sizes: Widths.
        depths: Blocks.
        num_heads: Attention heads; they divide the widths.
        mlp_ratios: Hidden width of the MLPs over the width, before the gate takes a third of it.
        sr_ratios: Side of a map over the side of its pooled keys. Where it is 1, attention is
            global; elsewhere a query sees the window around it and the pooled keys.
        window_size: Side of that window, odd.
        drop_path_rate: Share of images for which the last branch is left out in training, 0 to 1;
            it grows from 0 in equal steps.
        hidden_dropout: Dropout of what attentions and MLPs give, and inside the MLPs.
        initializer_range: Deviation of the weights of linear layers at the start.
        pretrain_size: Image size by which relative positions are scaled. Default: image_size, and
            it stays so in a saved config whose image_size is changed.
        shared_heads: Heads that are always on, the first ones: counts. None: a dense TransNeXt,
            without routers.
        active_heads: Heads that a token switches on, shared ones included: counts. Where both are
            num_heads, all heads are on and have learned weights.
        balance_coefficient: Weight of the balance loss, at least 0.

    Raises:
        ValueError: If a size is out of range, sizes do not fit each other or a stage's budget of
            heads is impossible.
    """

    model_type = "headwise_transnext"
    presets = PRESETS
    aliases = ("out_features", "out_indices")

    image_size: Count = 224
    patch_size: Count = 4
    num_channels: Count = 3
    hidden_sizes: Counts = (48, 96, 192, 384)
    depths: Counts = (2, 2, 15, 2)
    num_heads: Counts = (2, 4, 8, 16)
    mlp_ratios: tuple[Positive, ...] | list[Positive] = (8, 8, 4, 4)
    sr_ratios: Counts = (8, 4, 2, 1)
    window_size: Count = 3
    drop_path_rate: Rate = 0.15
    hidden_dropout: Rate = 0.0
    initializer_range: Weight = 0.02
    pretrain_size: Count | None = None
    shared_heads: tuple[Index, ...] | list[Index] | None = None
    active_heads: Counts | None = None
    balance_coefficient: Weight = 0.01
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        self.pretrain_size = self.image_size if self.pretrain_size is None else self.pretrain_size
        if self.window_size % 2 == 0:
            raise ValueError(f"window_size is {self.window_size}; it must be odd")
        self._check_stages()
        self._check_heads()
        self.check_image_size("image_size", self.image_size)
        self.stage_names = [f"stage{i + 1}" for i in range(self.num_stages)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None),
            out_indices=kwargs.pop("out_indices", None),
        )
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        """Stages, from the images to the head."""
        return len(self.hidden_sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbours on the map of each stage."""
        return tuple(self.patch_size * 2**i for i in range(self.num_stages))

    def pretrained_side(self, stage: int) -> int:
        """Side of that stage's map of an image of pretrain_size."""
        return (self.pretrain_size or self.image_size) // self.strides[stage]

    def budget(self, stage: int) -> HeadBudget | None:
        """The heads of that stage; None in a dense TransNeXt."""
        if self.shared_heads is None or self.active_heads is None:
            return None
        return HeadBudget.resolve(
            self.num_heads[stage],
            shared=self.shared_heads[stage],
            active=self.active_heads[stage],
            names=(f"shared_heads[{stage}]", f"active_heads[{stage}]"),
        )

    def check_image_size(self, field: str, *sides: int) -> None:
        """Refuse images of which some stage would have no pooled key."""
        pairs = zip(self.strides, self.sr_ratios, strict=True)
        least = 1 + max(stride * (ratio - 1) for stride, ratio in pairs)
        if min(sides) < least:
            raise ValueError(
                f"{field} is {' × '.join(map(str, sides))}; with patch_size {self.patch_size} and "
                f"sr_ratios {list(self.sr_ratios)} no side may be below {least}"
            )

    def _check_stages(self) -> None:
        fields = ["hidden_sizes", "depths", "num_heads", "mlp_ratios", "sr_ratios"]
        if (self.shared_heads is None) != (self.active_heads is None):
            raise ValueError(
                f"shared_heads is {self.shared_heads} and active_heads is {self.active_heads}; "
                "give both, or neither for a dense model"
            )
        if self.shared_heads is not None:
            fields += ["shared_heads", "active_heads"]
        for field in fields:
            values = getattr(self, field)
            if not values:
                raise ValueError(f"{field} is {values!r}; it must have an entry for each stage")
            if len(values) != len(self.hidden_sizes):
                raise ValueError(
                    f"{field} has {len(values)} entries and hidden_sizes {len(self.hidden_sizes)}; "
                    "both must have one for each stage"
                )
            setattr(self, field, tuple(values))

    def _check_heads(self) -> None:
        for stage, (dim, heads) in enumerate(zip(self.hidden_sizes, self.num_heads, strict=True)):
            if dim % heads:
                raise ValueError(
                    f"num_heads[{stage}] is {heads}; it must divide hidden_sizes[{stage}] = {dim}"
                )
            self.budget(stage)
