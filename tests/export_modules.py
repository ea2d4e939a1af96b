"""What test_export.py exports: layers of each kind, and converted models in the forms that run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import compile_check
import headwise
from compile_check import EXPERTS, HEADS, LLAMA, D, heads
from headwise import MHMoE, MoHAttention
from headwise.bitnet import pack

LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: new
        for name, new in compile_check.LAYERS.items()
        # Two norms are divided by their deviation, which may be as small as rounding.
        if not name.startswith("native") and name != "query_norm, groups"
    },
    "packed experts": lambda: pack(compile_check.LAYERS["ternary experts"]()),
    "one_stage": lambda: MoHAttention(D, **HEADS, router="one_stage"),
    "sparsemax": lambda: MoHAttention(D, **HEADS, scores="sparsemax"),
    "no routed heads": lambda: MoHAttention(D, num_heads=5, shared_heads=5, active_heads=5),
    "mh_moe, bias": lambda: MHMoE(D, num_heads=3, scores="sigmoid", bias_rate=0.1, **EXPERTS),
}
# Of sizes that the C++ kernels take, and so wide that projections leave heads out.
EVEN: dict[str, Callable[[], nn.Module]] = {
    "wide heads": lambda: MoHAttention(320, **HEADS, causal=True),
    "wide heads, query_norm": lambda: MoHAttention(320, **HEADS, router="query_norm"),
    "even experts": lambda: MHMoE(20, num_heads=2, num_experts=7, top_k=2, expert_dim=12),
    "wide linear": lambda: MHMoE(640, num_heads=2, num_experts=3, top_k=2, expert_dim=12),
}


class Both(nn.Module):
    """Heads, then experts: y and both routings."""

    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.experts = LAYERS["two_stage"](), LAYERS["mh_moe"]()

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Any]:
        x, of_heads = self.heads(x)
        y, of_experts = self.experts(x)
        return y, of_heads, of_experts


class Logits(nn.Module):
    """A model without a cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of what is no padding; of padding, whose rows see nothing, 0."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.logits * attention_mask.unsqueeze(-1)


class Step(nn.Module):
    """One token, with a static cache that comes in and goes out."""

    slots = 11

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        config = self.model.config
        past = StaticCache(config=config, max_cache_len=self.slots)
        of_heads = config.num_key_value_heads, config.head_dim
        past.early_initialization(1, *of_heads, torch.float32, "cpu")
        for layer, k, v in zip(past.layers, cache[::2], cache[1::2], strict=True):
            layer.keys, layer.values = k.clone(), v.clone()
            layer.cumulative_length = position.clone()
        logits = self.model(
            input_ids=token, past_key_values=past, position_ids=position.view(1, 1)
        ).logits
        return logits, *(x for layer in past.layers for x in (layer.keys, layer.values))

    def empty(self) -> list[Tensor]:
        config = self.model.config
        shape = (1, config.num_key_value_heads, self.slots, config.head_dim)
        return [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]


def llama(router: str = "two_stage", *, mlp: bool = False) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"max_position_embeddings": 200})).eval()
    experts = headwise.MHMoEConfig(num_heads=3, **EXPERTS) if mlp else None
    return headwise.convert(model, attention=heads(model, router), mlp=experts).eval()


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask in which the first row is padded on the left."""
    ids, mask = torch.randint(0, 31, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return ids, mask
