"""Compiles layers and a converted model; prints {case: "" or what went wrong} as JSON.

Run by test_compile.py in a process of its own: dynamo cannot trace jaxtyping's checks.
"""

import contextlib
import io
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

import headwise
from headwise import HeadRouting, MHMoE, MoE, MoHAttention, MoHMultiheadAttention
from headwise.bitnet import ternarize
from headwise.nn import FittedRouter, HeadBudget, TwoStageRouter
from headwise.ops import aggregated_attention, head_attention
from headwise.ops.linear import linear

B, T, D = 2, 7, 15
HEADS = {"num_heads": 5, "shared_heads": 2, "active_heads": 3}
GROUPS = {
    "num_heads": 6, "num_kv_heads": 3, "head_dim": 5, "shared_heads": 2, "active_heads": 4,
    "route_groups": True,
}  # fmt: skip
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}


class Encoder(nn.Module):
    """A layer of torch's, in which the attention is ours."""

    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 5, 11, dropout=0, batch_first=True)
        attention = MoHAttention(D, **HEADS)
        self.layer.self_attn = MoHMultiheadAttention(attention, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, HeadRouting]:
        hidden = None if mask is None else ~mask
        y = self.layer(x, src_key_padding_mask=hidden)
        return y, self.layer.self_attn.attention.router(x, mask)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "two_stage": lambda: MoHAttention(D, **HEADS, causal=True),
    "two_stage, paper": lambda: MoHAttention(D, **HEADS, mode="paper"),
    "query_norm": lambda: MoHAttention(D, **HEADS, router="query_norm", num_kv_heads=1),
    "window, norms": lambda: MoHAttention(D, **HEADS, causal=True, window=3, qk_norm=True),
    "widths": lambda: MoHAttention(D, **HEADS, causal=True, head_dims=(5, 3, 5, 3, 7)),
    "torch's encoder": lambda: Encoder(),
    "groups": lambda: MoHAttention(D, **GROUPS),
    "query_norm, groups": lambda: MoHAttention(D, **GROUPS, router="query_norm"),
    "mh_moe": lambda: MHMoE(D, num_heads=3, shared_expert_dim=13, **EXPERTS),
    "mh_moe, cosine": lambda: MHMoE(D, num_heads=3, router="cosine", **EXPERTS),
    "moe": lambda: MoE(D, **EXPERTS),
    "ternary heads": lambda: ternarize(MoHAttention(D, **HEADS, causal=True)),
    "ternary experts": lambda: ternarize(MHMoE(D, num_heads=3, shared_expert_dim=13, **EXPERTS)),
    "native heads": lambda: MoHAttention(20, **HEADS, causal=True, impl="native"),
    "native experts": lambda: MHMoE(
        20, num_heads=2, num_experts=7, top_k=2, expert_dim=12, impl="native"
    ),
}
LLAMA = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def half_mask() -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 4:] = False
    return mask


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """y, the routing and the gradients of everything."""
    module.zero_grad()
    x = inputs[0].detach().requires_grad_()
    y, routing = module(x, *inputs[1:])
    (y.square().sum() + headwise.balance_loss(routing)).backward()
    parameters = [p.grad for p in module.parameters() if p.grad is not None]
    return [y, *(r for r in routing if r is not None), x.grad, *parameters]


def layer(name: str, backend: str = "aot_eager", masked: bool = False) -> None:
    module = LAYERS[name]()
    x = torch.randn(B, T, module.dim)
    inputs = (x, half_mask()) if masked else (x,)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_close(gradients(compiled, *inputs), gradients(module, *inputs))


def heads(model: Any, router: str, **budget: int) -> Any:
    """What `convert` makes of the model's attention."""
    config = headwise.MoHConfig(router=router, router_std=0.02, **budget)
    if router != "fitted":
        return config
    ids = torch.randint(0, 31, (4, 4, 64))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    with contextlib.redirect_stdout(io.StringIO()):
        return headwise.fit(model, batches, config)


def model(router: str) -> None:
    """A training step of a converted model: the same loss and the same gradients."""
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    llama = headwise.convert(
        llama,
        attention=heads(llama, router),
        mlp=headwise.MHMoEConfig(num_heads=3, **EXPERTS),
    ).train()
    ids, mask = torch.randint(0, 31, (B, T)), half_mask().long()
    results = []
    for forward in (llama, torch.compile(llama, backend="aot_eager")):
        llama.zero_grad()
        loss = forward(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in llama.parameters())])
    assert_close(*results)


def without_labels() -> None:
    """In training, one graph; the loss is the caller's."""
    attention = headwise.MoHConfig(router="two_stage", router_std=0.02)
    llama = headwise.convert(LlamaForCausalLM(LlamaConfig(**LLAMA)), attention=attention).train()
    ids = torch.randint(0, 31, (B, T))
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    with headwise.record_routing(llama):
        want = llama(input_ids=ids).logits
    assert_close(compiled(input_ids=ids).logits, want)


def packed() -> None:
    """Documents in a row, apart by positions that start again, and in a sliding window."""
    mistral = MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=5)).eval()
    headwise.convert(mistral, attention=headwise.MoHConfig(router="query_norm"))
    ids, positions = torch.randint(0, 31, (B, T)), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    compiled = torch.compile(mistral, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = mistral(input_ids=ids, position_ids=positions).logits
        assert_close(compiled(input_ids=ids, position_ids=positions).logits, want)


def generating(router: str, model_class: Any, config: PreTrainedConfig) -> None:
    """A padded prompt and its continuation in a static cache, each step one graph."""
    dense = model_class(config).eval()
    converted = headwise.convert(dense, attention=heads(dense, router))
    ids, mask = torch.randint(3, 31, (B, T)), half_mask().long().flip(1)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    want = converted.generate(ids, **options)
    converted.forward = torch.compile(converted.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(converted.generate(ids, cache_implementation="static", **options), want)


def without_gradients(router: str) -> None:
    """A converted model that leaves out projections of heads, of a prompt and of one token."""
    sizes = LLAMA | {"hidden_size": 96, "head_dim": 64, "max_position_embeddings": 640}
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    headwise.convert(llama, attention=heads(llama, router, shared=2, active=3))
    with torch.no_grad():
        for ids in (torch.randint(0, 31, (2, 600)), torch.tensor([[5]])):
            want = llama(input_ids=ids, use_cache=False).logits
            compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
            assert_close(compiled(input_ids=ids, use_cache=False).logits, want)


def any_length(dtype: torch.dtype) -> None:
    """Routers of one graph for all numbers of tokens, as serving engines compile them."""
    budget = HeadBudget(num_heads=5, shared_heads=2, active_heads=3)
    for kind in (TwoStageRouter, FittedRouter):
        router = kind(16, budget).to(dtype)
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for tokens in (7, 11):
                x = torch.randn(1, tokens, 16, dtype=dtype)
                torch._dynamo.mark_dynamic(x, 1)
                assert_close(compiled(x).weights, router(x).weights)


def decoding() -> None:
    """One token against a cache, without gradients."""
    q, k, v = torch.randn(B, 1, 6, 10), *torch.randn(2, B, T, 3, 10)
    gate = torch.rand(B, 1, 6).round()
    attend = partial(head_attention, impl="native")
    with torch.no_grad():
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert_close(compiled(q, k, v, gate), attend(q, k, v, gate))


def aggregated(impl: str) -> None:
    """A map with gates that are off: the same values and gradients."""
    random = [torch.randn(2, tokens, 3, 4) for tokens in (15, 15, 15, 7, 7, 15)]
    gate = torch.rand(2, 15, 3).round()
    parameters = [torch.randn(size) for size in ((3, 9), (3, 15, 7), (3, 4, 9), (3, 9))]
    leaves = [x.requires_grad_() for x in (*random, gate, *parameters)]

    def attend(*leaves: Tensor) -> Tensor:
        *inputs, unit_q, gate, local_bias, pool_bias, learned_tokens, learned_bias = leaves
        return aggregated_attention(
            *inputs, gate, size=(3, 5), window=3, local_bias=local_bias, pool_bias=pool_bias,
            unit_q=unit_q, learned_tokens=learned_tokens, learned_bias=learned_bias, impl=impl,
        )  # fmt: skip

    results = []
    for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        y = call(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_close(*results)


def wide_linear() -> None:
    """So many products that another library might compute them."""
    x, weight, bias = torch.randn(300, 200), torch.randn(170, 200), torch.randn(170)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight, bias), nn.functional.linear(x, weight, bias))


# These need the C++ kernels.
NATIVE_CASES: dict[str, Callable[[], None]] = {
    **{name: partial(layer, name) for name in LAYERS if name.startswith("native")},
    "native decode": decoding,
    "native routers, any length": partial(any_length, torch.float32),
    "native routers, any length, bfloat16": partial(any_length, torch.bfloat16),
    "native model, two_stage": partial(without_gradients, "two_stage"),
    "native model, query_norm": partial(without_gradients, "query_norm"),
    "native model, fitted": partial(without_gradients, "fitted"),
    "native aggregated": partial(aggregated, "native"),
}
MASKED = ("two_stage", "query_norm", "mh_moe", "moe", "ternary experts")
INDUCTOR = {"backend": "inductor"}
CASES: dict[str, Callable[[], None]] = {
    "wide linear": wide_linear,
    "aggregated": partial(aggregated, "dense"),
    **{n: partial(layer, n) for n in LAYERS if n not in (*NATIVE_CASES, "ternary experts")},
    **{f"{n}, mask": partial(layer, n, masked=True) for n in MASKED},
    **{f"{n}, inductor": partial(layer, n, **INDUCTOR) for n in ("two_stage", "mh_moe", "moe")},
    **{
        f"model, {router}": partial(model, router)
        for router in ("two_stage", "query_norm", "fitted")
    },
    "model, without labels": without_labels,
    "model, packed": packed,
    "generating, two_stage": partial(
        generating, "two_stage", LlamaForCausalLM, LlamaConfig(**LLAMA)
    ),
    "generating, fitted": partial(generating, "fitted", LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "generating, query_norm, sliding window": partial(
        generating, "query_norm", MistralForCausalLM, MistralConfig(**LLAMA, sliding_window=5)
    ),
}


def outcome(case: str) -> str:
    torch.manual_seed(0)
    torch.compiler.reset()
    try:
        (CASES | NATIVE_CASES)[case]()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Dynamo looks at .grad of whatever crosses a graph break; inductor imports torch.jit.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")
    # torch on Python 3.13.0, of which 3.13.1 has the remedy.
    warnings.filterwarnings("ignore", "Guards may run slower")
    print(json.dumps({case: outcome(case) for case in sys.argv[1:]}))
