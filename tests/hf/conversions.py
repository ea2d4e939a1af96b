"""What the tests of this folder convert models to, and the tiny models that are converted."""

import pytest
import torch

from headwise import MHMoEConfig, MoEConfig, MoHConfig

LEARNED = MoHConfig(router="two_stage", router_std=0.02)
TWO_STAGE = MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02)
QUERY_NORM = MoHConfig(shared=2, active=4, router="query_norm")
GROUPS = MoHConfig(
    shared=0, active=3, mode="paper", route_groups=True, router="two_stage", router_std=0.02
)
ALL_ON = MoHConfig(shared=6, active=6, router="query_norm")
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}
MOE = MoEConfig(**EXPERTS)
MH_MOE = MHMoEConfig(num_heads=3, **EXPERTS)

# What a call of a class of transformers may name, and would get a dense model if it could.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
TEXT = SIZES | {
    "vocab_size": 31, "intermediate_size": 29, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
IMAGES = SIZES | {"intermediate_size": 29, "image_size": 10, "patch_size": 2, "num_labels": 7}
# Which config and model class of transformers, and its sizes.
FAMILIES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "Mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", TEXT),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "BERT": ("BertConfig", "BertForMaskedLM", TEXT),
    "ViT": ("ViTConfig", "ViTForImageClassification", IMAGES),
}


def tiny_dit(num_layers: int = 2) -> torch.nn.Module:
    """Of 4 heads of 8 channels; 8 × 8 latents of 2 channels, ten classes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=2, num_layers=num_layers,
        sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
