"""Diffusion transformers whose heads are routed: MoH-DiT, and the dense DiT."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModel, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from headwise.data.patches import patches_of
from headwise.hf.reading import StrictlyLoaded
from headwise.models.dit.config import DiTConfig
from headwise.models.own import BalancesHeads
from headwise.nn import MoHAttention
from headwise.nn.routers import ScoreMap
from headwise.ops.fields import check
from headwise.ops.tensors import check_tensor

_FREQUENCIES = 128
_LONGEST_PERIOD = 10_000


class SelfAttention(nn.Module):
    """Plain attention: what `MoHAttention` is with all heads on and even gates. Routes nothing."""

    is_causal = False

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim)
        self.k_proj = nn.Linear(dim, num_heads * head_dim)
        self.v_proj = nn.Linear(dim, num_heads * head_dim)
        self.o_proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, T, D] → [B, T, D], and no routing."""
        q, k, v = (
            rearrange(proj(x), "b t (h c) -> b h t c", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = scaled_dot_product_attention(q, k, v)
        return self.o_proj(rearrange(heads, "b h t c -> b t (h c)")), None


class TimeEmbedding(nn.Module):
    """Timesteps as vectors: W₂ SiLU(W₁ [cos(t·f) | sin(t·f)]), f from 1 down to nearly 1/10000."""

    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(2 * _FREQUENCIES, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """[B] → [B, D]."""
        powers = torch.arange(_FREQUENCIES, device=t.device, dtype=torch.float32) / _FREQUENCIES
        # In float32 whatever the weights are: bfloat16 does not tell 999 from 1000.
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(_LONGEST_PERIOD) * powers)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.down(silu(self.up(waves.to(self.up.weight.dtype))))


class DiTBlock(GradientCheckpointingLayer):
    """A block with adaLN-Zero, where c is what time and class say.

    [β₁, γ₁, α₁, β₂, γ₂, α₂] = W c
    x = x + α₁ · attention((1 + γ₁) · norm(x) + β₁)
    x = x + α₂ · mlp((1 + γ₂) · norm(x) + β₂)
    """

    def __init__(self, config: DiTConfig, layer: int):
        super().__init__()
        dim, heads = config.hidden_size, config.heads_per_layer[layer]
        budget = config.budgets[layer]
        head_dim = config.head_dim or dim // heads
        hidden = int(dim * config.mlp_ratio)
        self.attention: nn.Module
        if budget is None:
            self.attention = SelfAttention(dim, heads, head_dim)
        else:
            self.attention = MoHAttention(
                dim,
                num_heads=heads,
                shared_heads=budget.shared_heads,
                active_heads=budget.active_heads,
                head_dim=head_dim,
            )
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, T, D], and c [B, D] → [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )
        heads, _ = self.attention(adaptive_norm(x, shift1, scale1))
        x = x + gate1 * heads
        return x + gate2 * self.mlp(adaptive_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens to patches: W ((1 + γ) · norm(x) + β), with [β, γ] = W' c."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, T, D], and c [B, D] → [B, T, patch_size² · out_channels]."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(adaptive_norm(x, shift, scale))


class DiT(StrictlyLoaded, BalancesHeads, PreTrainedModel):
    """Predicts the noise in images of a class, and how large its variance is.

        x = W patches + positions,  c = SiLU(time(t) + class(y))
        x = block(x, c), layer by layer
        output = the patches of final(x, c), put together

    **Source**: DiT, arXiv 2212.09748 (adaLN-Zero); with routed heads MoH, arXiv 2410.11842, whose
    released code this equals (mode "released" of `ops.route_heads`).
    **Deviates**: SiLU is taken of c once, not in each block.

    Weights start as in the released code: matrices by Xavier's rule, q, k and v as one; embeddings
    at 0.02; modulations and the final layer at 0, so that blocks start as the identity and the
    output at 0. Sine and cosine positions are a parameter that is never trained.
    """

    # Saved pipelines name this module. "….dit.model" diffusers would mistake for its own "dit".
    __module__ = "headwise.models.dit"
    config_class = DiTConfig
    main_input_name = "x"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        dim, side = config.hidden_size, config.input_size // config.patch_size
        self.patch_embedding = nn.Linear(config.in_channels * config.patch_size**2, dim)
        self.time_embedding = TimeEmbedding(dim)
        self.label_embedding = nn.Embedding(config.num_labels + (config.class_dropout > 0), dim)
        self.positions = nn.Parameter(sin_cos_positions(dim, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_layer = FinalLayer(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but a missing, unexpected or misshapen weight is an error."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers makes every parameter that it loads a trained one.
        model.positions.requires_grad_(False)
        return loaded

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise, and with learn_sigma its variance: [B, out_channels, H, W].

        In training a share of class_dropout of the labels, drawn by torch's generator, counts as
        the null class.

        Args:
            x: Noisy images or latents, [B, in_channels, H, W].
            t: Timesteps, [B], whole or not.
            y: Classes, [B], 0..num_labels; num_labels is the null class.

        Raises:
            ValueError: If x is of another size or of whole numbers, t or y not one number an image,
                or y out of range or not of whole ones.
        """
        self._check_inputs(x, t, y)
        config = self.config
        if self.training and config.class_dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < config.class_dropout
            y = y.masked_fill(dropped, config.num_labels)
        c = silu(self.time_embedding(t) + self.label_embedding(y))
        x = self.patch_embedding(patches_of(x.to(self.dtype), config.patch_size)) + self.positions
        for block in self.blocks:
            x = block(x, c)
        p, side = config.patch_size, config.input_size // config.patch_size
        return rearrange(
            self.final_layer(x, c), "b (i j) (p q c) -> b c (i p) (j q)", i=side, p=p, q=p
        )

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance: e = e_null + scale · (e_class - e_null), of the noise.

        **Source**: the released code of DiT, which guides the first three channels of four.
        **Deviates**: of images with fewer channels no variance is guided.

        Args:
            x: [2B, in_channels, H, W]; only the first half is read, and used twice.
            t: [2B].
            y: The classes, then as many null classes, [2B].
            scale: 1 is no guidance, 0 no class.
            channels: How many of the noise's channels are guided, from the first; None for all.

        Returns:
            [2B, out_channels, H, W], of which the halves agree in what is guided.

        Raises:
            ValueError: As in `forward`, if the batch has no halves, or channels is below 1.
        """
        check_tensor("x", x, ("2B", "C", "H", "W"))
        check("scale", scale, float)
        if len(x) % 2:
            raise ValueError(f"x has {len(x)} images; guidance takes two halves")
        if channels is not None and channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1, or None for all")
        half = x[: len(x) // 2]
        output = self(torch.cat([half, half]), t, y)
        count = min(channels or self.config.in_channels, self.config.in_channels)
        of_class, of_null = output[:, :count].chunk(2)
        guided = of_null + scale * (of_class - of_null)
        return torch.cat([torch.cat([guided, guided]), output[:, count:]], dim=1)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        config = self.config
        size = (config.in_channels, config.input_size, config.input_size)
        check_tensor("x", x, ("B", *size), like=self.positions)
        check_tensor("t", t, x.shape[:1], kind="real", like=x)
        check_tensor("y", y, x.shape[:1], kind="whole", like=x)
        # What a graph or the meta device holds has no values yet.
        if torch.compiler.is_compiling() or y.is_meta:
            return
        highest = self.label_embedding.num_embeddings - 1
        wrong = y[(y < 0) | (y > highest)]
        if len(wrong):
            raise ValueError(f"y holds {wrong.tolist()}; classes must lie in 0..{highest}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As a whole: how a matrix starts depends on where it stands.
        if module is not self:
            return
        init: Any = initialization
        blocks: Any = self.blocks
        for part in self.modules():
            if isinstance(part, nn.Linear | ScoreMap):
                init.xavier_uniform_(part.weight)
            if isinstance(part, nn.Linear):
                init.zeros_(part.bias)
            elif isinstance(part, ScoreMap) and self.config.router_std is not None:
                init.normal_(part.weight, std=self.config.router_std)
        for block in blocks:
            attention = block.attention
            for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                rows, columns = part.weight.shape
                together = (rows + columns) / (3 * rows + columns)
                init.xavier_uniform_(part.weight, gain=math.sqrt(together))
        for part in (self.time_embedding.up, self.time_embedding.down, self.label_embedding):
            init.normal_(part.weight, std=0.02)
        for part in (*(block.modulation for block in blocks), self.final_layer.modulation):
            init.zeros_(part.weight)
        init.zeros_(self.final_layer.linear.weight)


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (1 + scale) · norm(x) + shift, where norm has no weights."""
    return (1 + scale) * layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def sin_cos_positions(dim: int, side: int) -> Tensor:
    """Fixed positions of a square's tokens, row by row: [side², dim].

    For column j and row i, with f = 10000^(-4n/dim), n < dim / 4:
    [sin(j·f) | cos(j·f) | sin(i·f) | cos(i·f)].
    """
    powers = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), _LONGEST_PERIOD**-powers)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    row, column = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    return torch.cat([column, row], dim=-1).to(torch.get_default_dtype())


AutoConfig.register(DiTConfig.model_type, DiTConfig)
AutoModel.register(DiTConfig, DiT)
