"""TransNeXt and MoH-ViT in timm's registry: import this module, then call `timm.create_model`."""

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from headwise.hf.checkpointing import checkpoint_activations, keep_activations
from headwise.models.transnext.config import PRESETS, TransNeXtConfig
from headwise.models.transnext.model import TransNeXtForImageClassification
from headwise.ops.choice import look_up

try:
    from timm.models import register_model
except ImportError as error:
    raise ValueError(
        f"timm's registry needs timm, and torchvision, which cannot be imported here ({error}); "
        "`pip install timm`"
    ) from None

# What timm, and the released code, call them. Fields of the config go by their own names too.
_OPTIONS = {field.name: field.name for field in fields(TransNeXtConfig)} | {
    "num_classes": "num_labels",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "drop_rate": "hidden_dropout",
}


class TimmTransNeXt(TransNeXtForImageClassification):
    """The same classifier, called as timm calls its models: images to logits, and no labels.

    Parameters keep their names. The balance losses of routed layers are in no loss: add
    `model.routing_loss(routings)` of what `headwise.record_routing` saw of the forward.

    Attributes:
        num_classes: Of the logits; 0 where there is no classifier.
        num_features: Width of the last map.
        pretrained_cfg: What timm's data transforms go by.
    """

    def __init__(self, config: TransNeXtConfig):
        super().__init__(config)
        self.num_classes: int = config.num_labels
        self.num_features = self.head_hidden_size = config.hidden_sizes[-1]
        size = (config.num_channels, config.image_size, config.image_size)
        self.pretrained_cfg = {"input_size": size, "num_classes": config.num_labels}
        self.default_cfg = self.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the last stage, [B, num_features, H, W]."""
        return self.backbone.maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map to logits, or with `pre_logits` to its mean over positions, [B, num_features]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The linear map that gives the logits."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; of 0 classes none, so that a forward gives [B, num_features].

        Raises:
            ValueError: If another pooling than the mean is asked for.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; it must be 'avg'")
        old = next(self.backbone.parameters())
        new: Any = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifier = new.to(old.device, old.dtype)
        if num_classes:
            self._init_weights(self.classifier)
            self.config.num_labels = num_classes
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a backward pass computes blocks again instead of keeping what is in them."""
        if enable:
            checkpoint_activations(self)
        else:
            keep_activations(self)


def _entry_point(preset: str) -> Any:
    """What timm calls to create the model of that preset."""

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> TimmTransNeXt:
        if pretrained or pretrained_cfg or pretrained_cfg_overlay or cache_dir:
            raise ValueError(
                "pretrained is asked for, but timm has no weights of this model; "
                "headwise.load_released reads the released ones"
            )
        changes = {look_up("option", name, _OPTIONS): options[name] for name in options}
        headless = changes.get("num_labels") == 0
        if headless:
            del changes["num_labels"]
        model = TimmTransNeXt(TransNeXtConfig.preset(preset, **changes))
        if headless:
            model.reset_classifier(0)
        return model

    create.__name__ = create.__qualname__ = preset.replace("-", "_")
    create.__doc__ = f"The preset {preset!r} of TransNeXtConfig, with changes."
    return create


# By module attributes, which timm lists in this module's __all__.
globals().update(
    {
        entry.__name__: register_model(entry)
        for entry in map(_entry_point, PRESETS)
        if "test" not in entry.__name__
    }
)
