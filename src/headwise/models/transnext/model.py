"""TransNeXt, and MoH-ViT, which is a TransNeXt whose attention heads are routed."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil
from transformers.models.pvt.image_processing_pvt import PvtImageProcessor
from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2DropPath
from transformers.utils.generic import can_return_tuple

from headwise.hf.training_loss import watch_training, with_routing_loss
from headwise.models.own import BalancesHeads
from headwise.models.transnext.config import TransNeXtConfig
from headwise.models.transnext.layers import (
    AggregatedAttention,
    ConvolutionalGLU,
    Geometry,
    GlobalAttention,
    to_map,
    to_tokens,
)
from headwise.nn.routers import ScoreMap
from headwise.ops.tensors import check_tensor
from headwise.parity import Reads


class Block(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x); in training a branch is left out at random."""

    def __init__(self, config: TransNeXtConfig, stage: int, drop_path: float):
        super().__init__()
        dim = config.hidden_sizes[stage]
        kind = GlobalAttention if config.sr_ratios[stage] == 1 else AggregatedAttention
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = kind(config, stage)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvolutionalGLU(config, stage)
        self.drop_path = PvtV2DropPath(drop_path)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), geometry))
        return x + self.drop_path(self.mlp(self.mlp_norm(x), geometry.size))


class Stage(nn.Module):
    """Overlapping patches become tokens; blocks; a norm; a map again.

    With stride s the patches are 2s - 1 pixels wide: 7 for 4, 3 for 2.
    """

    def __init__(self, config: TransNeXtConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        self.config, self.stage = config, stage
        dim = config.hidden_sizes[stage]
        channels = config.hidden_sizes[stage - 1] if stage else config.num_channels
        stride = 2 if stage else config.patch_size
        self.patches = nn.Conv2d(channels, dim, 2 * stride - 1, stride, padding=stride - 1)
        # As in the released code: torch's eps here and where keys are pooled, 1e-6 elsewhere.
        self.patch_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] to [B, D, H, W]."""
        x = self.patches(x)
        geometry = Geometry.of(x, self.config, self.stage, (x.shape[2], x.shape[3]))
        x = self.patch_norm(to_tokens(x))
        for block in self.blocks:
            x = block(x, geometry)
        return to_map(self.norm(x), geometry.size)


class TransNeXtPreTrainedModel(PreTrainedModel):
    """What the models share: how weights start."""

    config_class = TransNeXtConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ScoreMap):
            init.normal_(module.weight, std=std)
        elif isinstance(module, GlobalAttention):
            init.trunc_normal_(module.query_embedding, std=std)
            # softplus makes 1/0.24 of it.
            init.constant_(module.temperature, math.log(math.expm1(1 / 0.24)))
        if isinstance(module, AggregatedAttention):
            init.trunc_normal_(module.local_bias, std=std / 50)
            init.trunc_normal_(module.learned_tokens, std=std)
            init.zeros_(module.learned_bias)


class TransNeXtBackbone(BackboneMixin, TransNeXtPreTrainedModel):
    """Images to a pyramid of feature maps, for detection, segmentation or a head of one's own.

    **Source**: TransNeXt, arXiv 2311.17132; MoH-ViT: MoH, arXiv 2410.11842.
    **Deviates**: images of any size, for which positions are computed anew, where the released code
    fixes one. Pooled keys stand at H // sr_ratio by W // sr_ratio of the map that is there.

    Weights come with `TransNeXtBackbone.from_pretrained(directory)`, also those of a classifier.
    transformers' AutoBackbone has `from_config` for this class, but its `from_pretrained` takes
    names on the hub alone: what the hub does not have, it asks timm for.
    """

    has_attentions = False

    def __init__(self, config: TransNeXtConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu")
        of_stages = rates.split(list(config.depths))
        self.stages = nn.ModuleList(
            Stage(config, i, drop_paths.tolist()) for i, drop_paths in enumerate(of_stages)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BackboneOutput:
        """Feature maps of the stages that `config.out_features` names; default: the last.

        Args:
            pixel_values: Images, [B, channels, height, width], of any size that leaves each stage a
                pooled key.
            output_hidden_states: Whether to give the maps of all stages too.

        Returns:
            feature_maps, [B, hidden_sizes[i], H, W] each; H is the height over the stage's stride,
            rounded up.

        Raises:
            ValueError: If the images have another number of channels, are too small or of whole
                numbers.
        """
        maps = self.maps(pixel_values)
        named = dict(zip(self.stage_names, maps, strict=True))
        return BackboneOutput(
            feature_maps=tuple(named[name] for name in self.out_features),
            hidden_states=maps if output_hidden_states else None,
        )

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The map of every stage."""
        config = self.config
        sizes = ("B", config.num_channels, "height", "width")
        check_tensor("pixel_values", pixel_values, sizes, like=next(self.parameters()))
        config.check_image_size("size of pixel_values", *pixel_values.shape[2:])
        maps = [pixel_values.to(self.dtype)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])

    def reads_of_image(self, size: tuple[int, int]) -> dict[str, Reads]:
        """What modules read of an image of that size, for `parity.count_flops`."""
        reads = {}
        like = torch.empty(0, device="cpu")
        for i, stride in enumerate(self.config.strides):
            height, width = (math.ceil(side / stride) for side in size)
            geometry = Geometry.of(like, self.config, i, (height, width))
            tokens, pooled = height * width, math.prod(geometry.pooled)
            reads[f"stages.{i}"] = Reads(tokens)
            for j in range(self.config.depths[i]):
                name = f"stages.{i}.blocks.{j}.attention"
                reads[name] = Reads(tokens, pooled)
                reads[f"{name}.position_bias"] = Reads(len(geometry.coordinates))
                if self.config.sr_ratios[i] > 1:
                    # Beside scores and sum, the window has learned weights, half as much again.
                    near = 1.5 * self.config.window_size**2
                    reads[name] = Reads(tokens, pooled + near)
                    reads[f"{name}.kv_proj"] = Reads(tokens + pooled)
        return reads


class TransNeXtForImageClassification(BalancesHeads, TransNeXtPreTrainedModel):
    """Images to classes: logits = W mean over the last map's tokens.

    In training with labels, the balance losses of the routed layers are in the loss: their mean
    over the layers that route, times `balance_coefficient`.

    **Source**: TransNeXt, arXiv 2311.17132; MoH-ViT: MoH, arXiv 2410.11842.
    """

    # Labels may be soft, of which Trainer would count every class.
    accepts_loss_kwargs = False

    def __init__(self, config: TransNeXtConfig):
        super().__init__(config)
        self.backbone = TransNeXtBackbone(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()
        if config.balance_coefficient > 0:
            watch_training(self)

    @with_routing_loss
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify.

        Args:
            pixel_values: Images, [B, channels, height, width].
            labels: Classes, [B], or probabilities of all classes, [B, num_labels].
            output_hidden_states: Whether to give the maps of all stages too.

        Raises:
            ValueError: If the images have another number of channels or are too small, a label is
                out of range, or a dtype is another.
        """
        maps = self.backbone.maps(pixel_values)
        logits = self.classifier(maps[-1].mean((2, 3)))
        loss = None
        if labels is not None:
            _check_labels(labels, logits)
            loss = cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=maps if output_hidden_states else None
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse what are neither classes nor probabilities of them."""
    batch, classes = logits.shape
    if not isinstance(labels, Tensor) or labels.device != logits.device:
        where = labels.device if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels is {where}; it must be a tensor on {logits.device}")
    want = (batch, classes) if labels.is_floating_point() else (batch,)
    if labels.shape != want:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; it must be [{batch}], or [{batch}, {classes}] "
            "for probabilities"
        )
    if not labels.is_floating_point() and labels.dtype != torch.int64:
        raise ValueError(
            f"labels has dtype {labels.dtype}; it must be int64, or floating for probabilities"
        )
    if not labels.is_floating_point() and batch:
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels has {low if low < 0 else high}; classes are 0..{classes - 1} (num_labels)"
            )


AutoConfig.register(TransNeXtConfig.model_type, TransNeXtConfig)
AutoBackbone.register(TransNeXtConfig, TransNeXtBackbone)
AutoModelForImageClassification.register(TransNeXtConfig, TransNeXtForImageClassification)
# Older versions export an AutoImageProcessor that needs torchvision; the module has it without.
AutoImageProcessor.register(
    TransNeXtConfig,
    image_processor_classes={"pil": PvtImageProcessorPil, "torchvision": PvtImageProcessor},
)
