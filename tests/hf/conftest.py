"""Tiny random transformers models, one a family."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny import SIZES

TEXT = SIZES | {
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Builds a tiny model in eval mode: tiny("llama", num_hidden_layers=3)."""

    def build(family: str = "llama", **changes: object) -> PreTrainedModel:
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        model = model_class(config_class(**TEXT | changes)).eval()
        # Initialised as they are, tiny models attend almost evenly and heads hardly differ.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_proj" in name:
                    parameter.mul_(10)
                # As they are, all queries are equally long, and rounding would choose the heads.
                if "q_norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of seven tokens, none of them padding."""
    return torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["left", "right"])
def attention_mask(request: pytest.FixtureRequest) -> torch.Tensor:
    """Row 0 has three tokens of padding on one side, row 1 none."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return mask if request.param == "left" else mask.flip(1)
