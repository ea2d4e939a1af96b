"""MoHAttention where torch's own Transformer layers expect an nn.MultiheadAttention."""

from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.nn.moh import MoHAttention
from headwise.ops.fields import check, checked
from headwise.ops.tensors import check_tensor


class _NotForTheFastPath:
    """In place of weights that torch's fused Transformer layers would read, past the heads' gates.

    They are for plain tensors, and anything with a __torch_function__ keeps them away.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("the weights of heads that are routed are no in_proj_weight")


class MoHMultiheadAttention(nn.Module):
    """A MoHAttention that is called like nn.MultiheadAttention, and stands where one stood.

    Its output comes without the routing: `headwise.record_routing(model)` collects that.

    **Deviates** from nn.MultiheadAttention: need_weights is False by default and must be, for no
    attention weights are kept. Queries that key_padding_mask says are padding have all heads off.

    Args:
        attention: The layer, with its budget and dropout.
        batch_first: Whether tokens are [B, T, D]; else [T, B, D], as torch has it by default.

    Example:
        >>> layer = nn.TransformerEncoderLayer(256, 8, batch_first=True)
        >>> heads = headwise.MoHAttention(256, num_heads=8, shared_heads=2, active_heads=6)
        >>> layer.self_attn = headwise.MoHMultiheadAttention(heads, batch_first=True)
    """

    # What torch's layers ask before they take the fast path.
    _qkv_same_embed_dim = True
    in_proj_weight = in_proj_bias = _NotForTheFastPath()

    @checked
    def __init__(self, attention: MoHAttention, *, batch_first: bool = False):
        super().__init__()
        self.attention, self.batch_first = attention, batch_first
        self.embed_dim, self.num_heads = attention.dim, attention.budget.num_heads

    @property
    def out_proj(self) -> nn.Module:
        """The output projection, where torch's layers look for it."""
        return self.attention.o_proj

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "..."], None]:
        """Attend, to the query's own tokens where all three are one tensor.

        Args:
            query: Tokens that ask, [B, T, D], [T, B, D] or [T, D].
            key: Tokens to attend to: the query itself, or a context of the layer's context_dim.
            value: The same tensor as key.
            key_padding_mask: True for padding, or -inf for padding and 0 for tokens; [B, S] or [S].
            need_weights: Must be False.
            attn_mask: True where a query does not see a key, or a float that is added to the
                scores; [T, S] or [B·H, T, S].
            average_attn_weights: Of weights, and there are none.
            is_causal: attn_mask is the causal one, which is then not read, or not given.

        Returns:
            The output, shaped as the query, and None.

        Raises:
            ValueError: If need_weights is True, key is not value, or a mask is none of these.
        """
        if need_weights:
            raise ValueError(
                "need_weights is True; heads that are routed keep no attention weights, so it must "
                "be False"
            )
        if key is not value:
            raise ValueError(
                "key and value are two tensors; MoHAttention reads one, so they must be the same"
            )
        check("is_causal", is_causal, bool)
        context = None if key is query else key
        swapped = not self.batch_first and query.ndim == 3
        if swapped:
            query = query.transpose(0, 1)
            context = None if context is None else context.transpose(0, 1)
        real = None if key_padding_mask is None else _real_tokens(key_padding_mask)
        causal = is_causal and context is None
        y, _ = self.attention(
            query,
            real if context is None else None,
            context=context,
            context_mask=None if context is None else real,
            attn_mask=None if attn_mask is None or causal else self._seen(attn_mask),
            causal=causal or None,
        )
        return y.transpose(0, 1) if swapped else y, None

    def _seen(self, attn_mask: Tensor) -> Tensor:
        """The mask as MoHAttention has it: True where a key is seen, or what is added."""
        check_tensor("attn_mask", attn_mask, ("...", "T", "S"), kind="any")
        if attn_mask.ndim == 3 and len(attn_mask) % self.num_heads == 0:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask


def _real_tokens(key_padding_mask: Tensor) -> Tensor:
    """True for tokens. torch's layers bring every mask as floats."""
    check_tensor("key_padding_mask", key_padding_mask, ("...", "S"), kind="any")
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    real = key_padding_mask == 0
    # What torch.compile traces cannot be looked at.
    hidden = real | (key_padding_mask == -torch.inf)
    if not torch.compiler.is_compiling() and not hidden.is_meta and not hidden.all():
        raise ValueError(
            "key_padding_mask holds numbers other than 0 and -inf; what is added to scores goes "
            "into attn_mask"
        )
    return real
