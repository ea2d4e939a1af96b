"""A decoder whose attention heads may have different widths, dense or routed."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from headwise.hf.training_loss import watch_training, with_routing_loss
from headwise.models.own import BalancesHeads
from headwise.nn import ActiveBudget, Budget, HeadBudget, MoHAttention
from headwise.nn.head_widths import attend_by_width
from headwise.nn.moh import HeadRouterName
from headwise.nn.routers import ScoreMap
from headwise.ops.fields import Count, Positive, Weight, check_fields
from headwise.ops.routing import HeadMode
from headwise.ops.scores import HeadScores
from headwise.ops.tensors import check_tensor

Angles = tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]


class DecoderConfig(PreTrainedConfig):
    """Sizes of a `DecoderForCausalLM`.

    Attributes:
        vocab_size: Entries of the tokenizer, V.
        hidden_size: Width, D.
        intermediate_size: Hidden width of the MLPs.
        num_hidden_layers: Layers.
        head_dims: Channels of each attention head of a layer; their sum need not be hidden_size.
        rotary_dim: Channels of each head that rotary positions turn, the first ones; even, and no
            head may be narrower.
        rope_theta: Base of the angles by which they turn.
        max_position_embeddings: Tokens of the longest sequence that the model is for.
        initializer_range: Deviation with which weights start.
        shared_heads: Heads that are always on, the first ones: a count or a share. None for the
            dense model, which has all heads on and unweighed.
        active_heads: Heads that a token switches on, shared ones included. None for the dense one.
        router, mode, scores: As `MoHAttention` has them.
        router_std: Deviation with which routers start.
        balance_coefficient: Weight of the balance losses.

    Raises:
        ValueError: If a size is out of range or the budget of heads is impossible.
    """

    model_type = "headwise_decoder"

    vocab_size: Count = 4096
    hidden_size: Count = 128
    intermediate_size: Count = 344
    num_hidden_layers: Count = 4
    head_dims: tuple[Count, ...] | list[Count] = (16,) * 8
    rotary_dim: Count = 16
    rope_theta: Positive = 10_000.0
    max_position_embeddings: Count = 256
    initializer_range: Positive = 0.02
    shared_heads: Budget | None = None
    active_heads: ActiveBudget | None = None
    router: HeadRouterName = "two_stage"
    mode: HeadMode = "released"
    scores: HeadScores = "softmax"
    router_std: Weight = 0.02
    balance_coefficient: Weight = 0.01
    tie_word_embeddings: bool = True
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        self.head_dims = tuple(self.head_dims)
        if not self.head_dims:
            raise ValueError("head_dims is (); it must have an entry for each head")
        if self.rotary_dim % 2 or self.rotary_dim > min(self.head_dims):
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}; it must be even, and at most min(head_dims) = "
                f"{min(self.head_dims)}"
            )
        if self.use_cache:
            raise ValueError("use_cache is True; the model has no cache, so it must be False")
        _ = self.budget
        super().__post_init__(**kwargs)

    @property
    def budget(self) -> HeadBudget | None:
        """The heads of a layer; None for the dense model."""
        if (self.shared_heads is None) != (self.active_heads is None):
            raise ValueError(
                f"shared_heads is {self.shared_heads} and active_heads is {self.active_heads}; "
                "give both, or neither for the dense model"
            )
        if self.shared_heads is None or self.active_heads is None:
            return None
        return HeadBudget.resolve(
            len(self.head_dims), shared=self.shared_heads, active=self.active_heads
        )


class CausalAttention(nn.Module):
    """The attention of `MoHAttention` with all heads on, unweighed: each has a gate of 1."""

    is_causal = True

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dims = tuple(config.head_dims)
        dim, width = config.hidden_size, sum(self.head_dims)
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None, *, rotary: Angles
    ) -> tuple[Float[Tensor, "B T D"], None]:
        """The output, and no routing."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        gate = q.new_ones(*q.shape[:2], len(self.head_dims))
        heads = attend_by_width(
            q, k, v, gate, self.head_dims, real=mask, rotary=rotary, causal=True, share_on=1.0
        )
        return self.o_proj(heads), None


def _attention(config: DecoderConfig) -> nn.Module:
    if config.shared_heads is None or config.active_heads is None:
        return CausalAttention(config)
    return MoHAttention(
        config.hidden_size,
        num_heads=len(config.head_dims),
        shared_heads=config.shared_heads,
        active_heads=config.active_heads,
        head_dims=config.head_dims,
        router=config.router,
        mode=config.mode,
        scores=config.scores,
        causal=True,
        bias=False,
    )


class GatedMLP(nn.Module):
    """W_down (silu(W_gate x) · W_up x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """[B, T, D] to [B, T, D]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = _attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Angles) -> Tensor:
        """[B, T, D] to [B, T, D]; mask is False for padding, [B, T]."""
        y, _ = self.attention(self.attention_norm(x), mask, rotary=rotary)
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class DecoderForCausalLM(BalancesHeads, PreTrainedModel, GenerationMixin):
    """Tokens to logits of the next ones: Llama's layers, around heads of any widths.

        x = embedding(token);  x += attention(norm x);  x += mlp(norm x);  logits = E norm(x)

    The output matrix E is the embedding's. In training with labels the balance losses of the
    layers that route, their mean times `balance_coefficient`, are in the loss.

    **Source**: Llama, arXiv 2302.13971; MoH, arXiv 2410.11842, for routed heads.
    **Deviates**: heads of different widths, in neither. Rotary positions turn the first rotary_dim
    channels of every head. There is no cache: each step of `generate` reads all tokens again.
    """

    config_class = DecoderConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ("DecoderLayer",)
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.balance_coefficient > 0:
            watch_training(self)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, ScoreMap):
            init.normal_(module.weight, std=self.config.router_std)
        else:
            super()._init_weights(module)

    @with_routing_loss
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = False,
    ) -> CausalLMOutput:
        """Say what comes next.

        Args:
            input_ids: Tokens, [B, T].
            attention_mask: 0 for padding, on either side, [B, T]. Positions count without it.
            labels: The tokens again, -100 for those that do not count, [B, T]; token t is compared
                with what the model says after t - 1.
            num_items_in_batch: What the loss is divided by, under gradient accumulation; default:
                what has a label here.
            use_cache: What `generate` always says; True is refused.

        Returns:
            logits, [B, T, V], and with labels the loss, in nats.

        Raises:
            ValueError: If a shape, dtype or device is another, or a cache is wanted.
        """
        if use_cache:
            raise ValueError("use_cache is True; the model has no cache, so it must be False")
        ids = input_ids
        check_tensor("input_ids", ids, ("B", "T"), kind="whole", like=self.embed_tokens.weight)
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, ids.shape, kind="any", like=ids)
        if labels is not None:
            check_tensor("labels", labels, ids.shape, kind="whole", like=ids)
        mask = None if attention_mask is None else attention_mask.bool()
        rotary = self._angles(input_ids, mask)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask, rotary)
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        return CausalLMOutput(loss=loss, logits=logits)

    def _angles(self, ids: Tensor, mask: Tensor | None) -> Angles:
        """cos and sin of each position's angles, each of them twice, as Llama's: [B, T, R]."""
        width, base = self.config.rotary_dim, self.config.rope_theta
        real = torch.ones_like(ids) if mask is None else mask
        positions = (real.cumsum(1) - 1).clamp_min(0)
        steps = torch.arange(0, width, 2, device=ids.device, dtype=torch.float32) / width
        angles = positions.unsqueeze(-1) * base**-steps
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _norm(config: DecoderConfig) -> nn.RMSNorm:
    return nn.RMSNorm(config.hidden_size, eps=1e-6)


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
