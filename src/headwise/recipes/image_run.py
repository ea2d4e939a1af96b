"""What runs on images of classes share: sizes by name, and a share of heads that is on."""

from dataclasses import dataclass
from typing import ClassVar

from headwise.hf import MoHConfig
from headwise.ops.choice import look_up
from headwise.recipes.arguments import check_at_least
from headwise.recipes.comparison import ComparisonRun, Variant


@dataclass(frozen=True, kw_only=True)
class ImageRun(ComparisonRun):
    """A dense model of images and the same with routed heads.

    Attributes:
        data: Images with classes: None for scikit-learn's digits, a Parquet file, a directory with
            a directory for each class, a dataset's name.
        size: Sizes of the models, by name.
        image_size: Side to which images are cropped and resized; None leaves them.
        active_heads: Of the model with routed heads, the share of heads that are on.
        shared_heads: The share of these that is always on.
        flip: Probability that an image is mirrored.
    """

    # Presets of the model's configuration, by size; what the two models are called.
    sizes: ClassVar[dict[str, str]]
    dense_label: ClassVar[str]
    routed_label: ClassVar[str]

    size: str = "test"
    image_size: int | None = None
    active_heads: float = 0.75
    shared_heads: float = 0.5
    flip: float = 0.0

    def __post_init__(self) -> None:
        look_up("size", self.size, self.sizes)
        if self.image_size is not None:
            check_at_least(1, "image_size", self.image_size)
        for name in ("active_heads", "shared_heads"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1, above 0")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}; it must lie in 0..1")
        super().__post_init__()

    @property
    def preset(self) -> str:
        """Of the model's configuration."""
        return self.sizes[self.size]

    def variants(self) -> list[Variant]:
        """Dense, and routed with `active_heads`."""
        return [self.dense(), self.routed(self.active_heads)]

    def dense(self) -> Variant:
        """The model without routers."""
        return Variant(name="dense", label=self.dense_label)

    def routed(self, active: float) -> Variant:
        """The model with that share of its heads on."""
        percent = f"{100 * active:.0f}"
        return Variant(
            name=f"moh_{percent}",
            label=f"{self.routed_label}, {percent} %",
            attention=MoHConfig(
                shared=self.shared_heads * active,
                active=active,
                balance_coefficient=self.balance_coefficient,
                router="two_stage",
                router_std=0.02,
            ),
            position=100 * active,
        )
