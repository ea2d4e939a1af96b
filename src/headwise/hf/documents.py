"""Documents in a row, packed without padding: each token sees only its own."""

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def keep_documents_apart(model: nn.Module, attentions: Iterable[nn.Module]) -> None:
    """Let the model, and each model in it, find documents by `position_ids` that start again.

    transformers looks for them while it makes a mask, and only where there is no cache; by default
    a model makes one in each forward. Attentions that see to both sides, in encoders, take
    documents by `cu_seq_lens_q` alone, as transformers' do.
    """
    if not all(getattr(attention, "is_causal", True) for attention in attentions):
        return
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            parameters = inspect.signature(part.forward).parameters
            takes_more = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
            if "position_ids" in parameters and takes_more:
                hook = functools.partial(_find_documents, tuple(parameters))
                part.register_forward_pre_hook(hook, with_kwargs=True)


def _find_documents(
    names: Sequence[str], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hands `cu_seq_lens_q` and `_k` down where a cache is empty and nobody gave a mask or them.

    A document begins at position 0, as transformers has it for flash attention; other jumps of
    positions begin none.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    positions = given.get("position_ids")
    others = (given.get(name) for name in ("attention_mask", "cu_seq_lens_q"))
    if positions is None or positions.ndim != 2 or any(x is not None for x in others):
        return None
    tokens = positions.shape[1]
    past = given.get("past_key_values")
    traced = torch.compiler.is_compiling()
    # A graph cannot ask how much is in a static cache.
    if tokens == 1 or (past is not None and (traced or int(past.get_seq_length()))):
        return None
    ids = given.get("input_ids")
    rows = len(given["inputs_embeds"] if ids is None else ids)
    begins = (positions == 0).expand(rows, tokens).clone()
    begins[:, 0] = True
    count = begins.numel()
    places = torch.arange(count, device=begins.device)
    if traced:
        # The values are not known: documents without a token, at the end, fill up.
        edges = torch.where(begins.flatten(), places, count).sort().values
    else:
        edges = places[begins.flatten()]
        if len(edges) == rows:
            return None
    edges = torch.cat([edges, edges.new_full((1,), count)]).int()
    return args, {**kwargs, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges}


def mask_of_documents(
    mask: Tensor | None, cu_seq_lens: Tensor, rows: int, tokens: int, *, causal: bool
) -> Tensor:
    """The mask [B, 1, T, T], or none, without what is in other documents.

    Args:
        mask: Booleans, or what is added to the scores. Of None `causal` says what it stands for.
        cu_seq_lens: Where documents begin in all rows, one after another, and B · T.
        rows: B.
        tokens: T.
        causal: Whether no token sees a later one.

    Raises:
        ValueError: If the documents do not end where the rows do. A graph does not ask.
    """
    if not torch.compiler.is_compiling() and int(cu_seq_lens[-1]) != rows * tokens:
        raise ValueError(
            f"cu_seq_lens_q is {cu_seq_lens.tolist()}; it must ascend from 0 to B · T = "
            f"{rows * tokens}: where documents begin, and where the last one ends"
        )
    places = torch.arange(rows * tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    document = torch.searchsorted(cu_seq_lens, places, right=True).view(rows, 1, tokens)
    own = (document.unsqueeze(-1) == document.unsqueeze(-2)).view(rows, 1, tokens, tokens)
    if mask is None:
        return own.tril() if causal else own
    return own & mask if mask.dtype == torch.bool else mask.masked_fill(~own, -torch.inf)
