"""Serving: requests of several lengths at once, batched continuously by transformers."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import headwise
from headwise.bench.comparison import Builder, Comparison, Effort, Rival
from headwise.bench.model import THREE_QUARTERS, Kind
from headwise.hf.batching import check_supported
from headwise.training.speed import logits_thrice

_LAYERS, _VOCABULARY = 4, 512
_PAGE = 64  # tokens
_COMPARED = 257  # tokens of the prompt whose logits are compared


def comparisons(effort: Effort) -> Iterator[Builder]:
    """Few requests, and many."""
    dtype = torch.bfloat16 if effort.device.type == "cuda" else torch.float32
    requests: tuple[int, ...] = (8, 64)
    lengths, new_tokens = (32, 128, 512), 32
    if effort.quick:
        requests = requests[:1]
    if effort.toy:
        requests, lengths, new_tokens = (5,), (3, 17, 67), 5
    for count in requests:
        yield partial(compare, effort, dtype, count, lengths, new_tokens)


def compare(
    effort: Effort,
    dtype: torch.dtype,
    count: int,
    lengths: tuple[int, ...],
    new_tokens: int,
    kind: Kind = THREE_QUARTERS,
) -> Comparison:
    """Until every request has its tokens: the dense model by torch's attention, and ours.

    transformers gives torch's attention a mask of all requests by all keys; ours keeps requests
    apart without. What that is worth alone says our attention with every head on.
    """
    check_supported()
    routed = headwise.MoHConfig(router="query_norm", shared=kind.shared, active=kind.active)
    all_on = headwise.MoHConfig(router="query_norm", shared=kind.heads, active=kind.heads)
    dense = _model(effort, dtype, kind)
    ours = headwise.convert(_model(effort, dtype, kind), attention=routed)
    every_head = headwise.convert(_model(effort, dtype, kind), attention=all_on)
    torch.manual_seed(0)
    written = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Room for all requests at once; transformers would take most of the memory.
    longest = -(-(max(lengths) + new_tokens) // _PAGE)
    pages = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=count * longest)

    # It warns at each call that a manager was made for these requests.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def serve(model: Any) -> None:
        # Others each time: what a request shares with earlier ones is kept, and not read again.
        prompts = [
            torch.randint(_VOCABULARY, (lengths[i % len(lengths)],)).tolist() for i in range(count)
        ]
        model.generate_batch(
            prompts, generation_config=written, continuous_batching_config=pages,
            progress_bar=False, persistent_manager=True,
        )  # fmt: skip

    compared = torch.randint(_VOCABULARY, (1, 67 if effort.toy else _COMPARED))
    return Comparison(
        f"{count} requests",
        f"prompts of {', '.join(map(str, lengths))} tokens, {new_tokens} new ones, Llama "
        f"d={kind.dim}, {kind.heads} heads, {kind.kv_heads} kv, {_LAYERS} layers",
        dtype,
        kind.active / kind.heads,
        partial(serve, ours),
        {
            "dense model": Rival(partial(serve, dense)),
            "headwise, every head on": Rival(partial(serve, every_head)),
        },
        lambda: logits_thrice(ours, compared.to(effort.device)),
        launches=True,
    )


def _model(effort: Effort, dtype: torch.dtype, kind: Kind) -> Any:
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=kind.dim, num_attention_heads=kind.heads,
        num_key_value_heads=kind.kv_heads, num_hidden_layers=_LAYERS,
        intermediate_size=8 * kind.dim // 3, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(effort.device, dtype).eval()
