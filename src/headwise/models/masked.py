"""Masked modelling of images and text by one transformer that both share."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils import ModelOutput

from headwise.data.masked_pairs import IGNORED
from headwise.data.patches import patches_of
from headwise.ops.fields import Count, check_fields
from headwise.ops.tensors import check_tensor


class MaskedConfig(ViTConfig):
    """Sizes of a `MaskedModel`: ViT's, and those of its text and its codebook.

    Attributes:
        image_size: Side of the images, in pixels; patch_size divides it.
        patch_size: Side of a patch, in pixels.
        num_channels: Of the images.
        vocab_size: Entries of the tokenizer, the mask token included.
        max_text_length: Most text tokens beside an image.
        codebook_size: Visual tokens.
    """

    model_type = "headwise_masked"

    image_size: Count = 8
    patch_size: Count = 2
    num_channels: Count = 1
    vocab_size: Count = 512
    max_text_length: Count = 32
    codebook_size: Count = 64

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}; it must divide image_size = {self.image_size}"
            )
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of an image, P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.num_channels * self.patch_size**2


@dataclass
class MaskedOutput(ModelOutput):
    """What a `MaskedModel` returns.

    Attributes:
        loss: Mean negative log-likelihood of all that is masked, in nats; None without labels. In
            training of a converted model the balance losses are in it.
        text_loss: The same of masked text tokens alone; nan where none is masked.
        image_loss: The same of masked patches alone; nan where none is masked.
        image_logits: [B, P, codebook].
        text_logits: [B, T, V].
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    image_logits: Tensor | None = None
    text_logits: Tensor | None = None


class MaskedModel(PreTrainedModel):
    """Reads an image and its text, parts of both masked, and says what the parts are.

        x = [W patch + position + image | embedding(token) + position + text]
        x = transformer(x), every token attends to every other
        logits of patches = W_image norm(x),  of tokens = W_text norm(x)

    The layers are ViT's; `headwise.convert` routes their heads and puts experts for their MLPs,
    which image and text then share.

    **Source**: masked multi-modal modelling of MH-MoE, arXiv 2404.15045, in the manner of BEiT-3,
    arXiv 2208.10442. **Deviates**: visual tokens are the nearest entries of a k-means codebook of
    patches, not those of a learned tokenizer; one MLP for both modalities, as in MH-MoE, not one
    for each.

    Attributes:
        codebook: The patch that each visual token stands for, [codebook, patch]; saved with the
            weights, never trained. Zeros until it is filled.
    """

    config_class = MaskedConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ("ViTLayer",)
    _supports_sdpa = True
    _supports_attention_backend = True

    codebook: Tensor

    def __init__(self, config: MaskedConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.patches = nn.Linear(config.patch_dim, dim)
        self.masked_patch = nn.Parameter(torch.zeros(dim))
        self.tokens = nn.Embedding(config.vocab_size, dim)
        self.patch_positions = nn.Embedding(config.num_patches, dim)
        self.text_positions = nn.Embedding(config.max_text_length, dim)
        self.modalities = nn.Embedding(2, dim)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.image_head = nn.Linear(dim, config.codebook_size)
        self.text_head = nn.Linear(dim, config.vocab_size)
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.patch_dim))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        masked_patches: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedOutput:
        """Predict what is masked. The sequence is the P patches, row by row, then the T tokens.

        Args:
            pixel_values: Images in -1..1, [B, channels, image_size, image_size].
            input_ids: Text, masked tokens replaced by the mask token, [B, T].
            masked_patches: True for patches that the model must not see, [B, P].
            attention_mask: 0 for padding, on any side of the text, [B, P + T].
            labels: Visual tokens of masked patches and tokens of masked text; -100 for what is not
                masked, [B, P + T].
            num_items_in_batch: What the loss is divided by, under gradient accumulation; default:
                what is masked here.

        Raises:
            ValueError: If the images are of another size, the text is too long, or a shape or dtype
                is another.
        """
        mask = attention_mask
        self._check_inputs(pixel_values, input_ids, masked_patches, mask, labels)
        x = torch.cat([
            self._embed_image(pixel_values, masked_patches),
            self._embed_text(input_ids, mask),
        ], dim=1)  # fmt: skip
        seen = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=mask)
        for layer in self.layers:
            x = layer(x, seen)
        patches = self.config.num_patches
        image, text = self.norm(x).split([patches, input_ids.shape[1]], dim=1)
        image_logits, text_logits = self.image_head(image), self.text_head(text)
        if labels is None:
            return MaskedOutput(image_logits=image_logits, text_logits=text_logits)
        image_nats, image_count = summed_nats(image_logits, labels[:, :patches])
        text_nats, text_count = summed_nats(text_logits, labels[:, patches:])
        count = image_count + text_count if num_items_in_batch is None else num_items_in_batch
        return MaskedOutput(
            loss=(image_nats + text_nats) / count,
            text_loss=(text_nats / text_count).detach(),
            image_loss=(image_nats / image_count).detach(),
            image_logits=image_logits,
            text_logits=text_logits,
        )

    def _check_inputs(
        self, pixels: Tensor, ids: Tensor, masked: Tensor | None, seen: Any, labels: Any
    ) -> None:
        config = self.config
        size = (config.num_channels, config.image_size, config.image_size)
        check_tensor("pixel_values", pixels, ("B", *size), like=self.masked_patch)
        batch = len(pixels)
        check_tensor("input_ids", ids, (batch, "T"), kind="whole", like=pixels)
        if ids.shape[1] > config.max_text_length:
            raise ValueError(
                f"input_ids has {ids.shape[1]} tokens; max_text_length is {config.max_text_length}"
            )
        whole = (batch, config.num_patches + ids.shape[1])
        if masked is not None:
            sizes = (batch, config.num_patches)
            check_tensor("masked_patches", masked, sizes, kind="torch.bool", like=pixels)
        if seen is not None:
            check_tensor("attention_mask", seen, whole, kind="any", like=pixels)
        if labels is not None:
            check_tensor("labels", labels, whole, kind="whole", like=pixels)

    def _embed_image(self, pixels: Tensor, masked: Tensor | None) -> Tensor:
        x = self.patches(patches_of(pixels.to(self.dtype), self.config.patch_size))
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.masked_patch, x)
        return x + self.patch_positions.weight + self.modalities.weight[0]

    def _embed_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        # Counted without padding, so that it may stand on either side.
        counted = torch.ones_like(ids) if mask is None else mask[:, self.config.num_patches :]
        positions = (counted.cumsum(1) - 1).clamp_min(0)
        return self.tokens(ids) + self.text_positions(positions) + self.modalities.weight[1]


def summed_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of what has a label, and how much that is."""
    nats = cross_entropy(
        rearrange(logits.float(), "b t v -> (b t) v"),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return nats, (labels != IGNORED).sum()


AutoConfig.register(MaskedConfig.model_type, MaskedConfig)
AutoModel.register(MaskedConfig, MaskedModel)
