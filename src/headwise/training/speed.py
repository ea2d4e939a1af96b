"""What a prompt and the next token cost a dense model and one with routed heads, side by side."""

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headwise.analysis.records import Speed
from headwise.hf import attention, record_routing
from headwise.nn import HeadRouter
from headwise.ops import Routing, head_attention
from headwise.ops.native import is_built
from headwise.progress import followed
from headwise.training.timing import LARGEST_ERROR_RATIO, error_ratio, interleaved

# As many tokens as kernels take for a prompt: see `head_attention`'s choice.
_COMPARED_TOKENS = 257
_INPUTS = 3
_ROUNDS, _WARMUPS, _SECONDS, _MOST_SECONDS = 7, 2, 1.0, 30.0


class Timed(NamedTuple):
    """Speeds of two models, and how they were taken, or why they were not."""

    speeds: list[Speed]
    note: str


def time_models(dense: Any, routed: Any, *, contexts: Sequence[int]) -> Timed:
    """Time the next token and a prompt at each of the contexts, in turns, medians after warm-ups.

    Correctness first: nothing is timed unless the logits with heads skipped are as near to the
    exact ones as those of torch's own attention.

    Args:
        dense, routed: Language models of one layout of heads, in eval mode.
        contexts: Tokens of the prompt, or of the cache that the next token reads.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense, routed = dense.to(device), routed.to(device)
    length = min(_COMPARED_TOKENS, max(contexts))
    ids = torch.randint(routed.config.vocab_size, (1, length), device=device)
    error = error_ratio(*logits_thrice(routed, ids))
    if error > LARGEST_ERROR_RATIO:
        return Timed([], f"Not timed: MoH's logits have {error:.1f} times plain PyTorch's error.")
    cases = list(product(contexts, _STEPS))
    title = "Timing dense against MoH"
    print(f"{title} at {' and '.join(f'{n:,}' for n in contexts)} tokens: a minute", flush=True)
    shown = followed(
        cases,
        title,
        total=len(cases),
        describe=lambda case: f"{case[1]} at {case[0]:,} tokens",
        alike=False,
    )
    speeds = [_timed(dense, routed, step, context) for context, step in shown]
    return Timed(speeds, _note(routed, device))


def _timed(dense: Any, routed: Any, step: str, context: int) -> Speed:
    run = _STEPS[step](dense, context)
    times = interleaved(
        {"dense": partial(run, dense), "routed": partial(run, routed)},
        rounds=_ROUNDS, seconds=_SECONDS, warmups=_WARMUPS, device=dense.device,
        most_seconds=_MOST_SECONDS,
    )  # fmt: skip
    return Speed(step, context, times["dense"], times["routed"])


def _token_at(dense: Any, context: int) -> Callable[[Any], None]:
    """What reads one token more; both models have the same cache."""
    cache = filled_cache(dense, context)
    turn = _inputs(dense, 1)
    return lambda model: read_token(model, next(turn), cache)


def _prompt_of(dense: Any, context: int) -> Callable[[Any], Tensor]:
    turn = _inputs(dense, context)
    return lambda model: read_prompt(model, next(turn))


def _inputs(model: Any, length: int) -> "cycle[Tensor]":
    size = (_INPUTS, 1, length)
    return cycle(torch.randint(model.config.vocab_size, size, device=model.device))


_STEPS = {"next token": _token_at, "prompt": _prompt_of}


def _note(routed: Any, device: torch.device) -> str:
    shares = [m.budget.active_share for m in routed.modules() if isinstance(m, HeadRouter)]
    kernels = (
        f"on {torch.cuda.get_device_name(device)}"
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU thread(s), kernels "
        f"{'built' if is_built() else 'not built (`headwise compile`)'}"
    )
    dtype = str(routed.dtype).removeprefix("torch.")
    return (
        f"{sum(shares) / len(shares):.0%} of heads on, one sequence, {dtype}, {kernels}; medians "
        f"of at least {_ROUNDS} runs in turns, or of 3 where they take over {_MOST_SECONDS:.0f} s; "
        "random tokens and caches."
    )


@torch.no_grad()
def read_prompt(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last token of a prompt [B, T]."""
    return model(ids, logits_to_keep=1, use_cache=False).logits


@torch.no_grad()
def read_token(model: Any, token: Tensor, cache: DynamicCache) -> None:
    """One token [B, 1] after those in the cache, which is cropped back; a sliding one moves on."""
    model(input_ids=token, **{_name_of_cache(type(model).forward): cache}, use_cache=True)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.crop(-1)


@functools.cache
def _name_of_cache(forward: Any) -> str:
    """Of the argument, which transformers 5.24 renames."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def filled_cache(model: Any, length: int, sequences: int = 1) -> DynamicCache:
    """A cache as generation has it after so many tokens, of random keys and values."""
    config = model.config
    cache = DynamicCache(config=config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = (2, sequences, num_kv_heads, length, width)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(size, device=model.device).to(model.dtype)
        cache.update(keys, values, layer)
    return cache


def logits_thrice(routed: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, those of the same model and routing by torch's attention, and these in float64."""
    dtype = routed.dtype
    with torch.no_grad():
        with record_routing(routed) as routings:
            got = routed(ids).logits
        routers = {name: routed.get_submodule(name) for name in routings}
        try:
            for name, router in routers.items():
                router.forward = partial(_decided, routings[name])
            with patch.object(attention, "head_attention", partial(head_attention, impl="dense")):
                usual, exact = routed(ids).logits, routed.double()(ids).logits
        finally:
            for router in routers.values():
                del router.forward
            routed.to(dtype)
    return [got], [usual], [exact]


def _decided(routing: Routing, *_: Any) -> Routing:
    return routing
