"""Continuous batching: requests in one row, keys and values in pages, equal to `generate`."""

from dataclasses import replace

import pytest
import torch
from conversions import GROUPS, LEARNED, MH_MOE, QUERY_NORM, TWO_STAGE
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from headwise import convert
from headwise.hf.batching import IS_SUPPORTED
from headwise.ops.attention import pages

pytestmark = pytest.mark.skipif(
    not IS_SUPPORTED, reason="transformers is too old for continuous batching of routed heads"
)
CONVERSIONS = {
    "two_stage": {"attention": TWO_STAGE},
    "query_norm": {"attention": QUERY_NORM},
    "groups": {"attention": GROUPS},
    "one layer": {"attention": LEARNED, "layers": [1]},
    "all on": {"attention": replace(QUERY_NORM, active=6)},
    "experts": {"mlp": MH_MOE},
    "both": {"attention": TWO_STAGE, "mlp": MH_MOE},
}
PROMPTS = [[3, 5, 7], [4, 6, 8, 9, 10, 11, 5, 3, 13], [17], [3, 5, 7, 11, 13]]
GREEDY = GenerationConfig(max_new_tokens=11, do_sample=False, eos_token_id=-1, pad_token_id=0)
# Fewer tokens at once than the prompts have, so that one of them is read in pieces.
PAGES = ContinuousBatchingConfig(num_blocks=16, block_size=4, max_batch_tokens=7)


def batched(model, prompts=PROMPTS, config=PAGES):
    found = model.generate_batch(
        prompts, generation_config=GREEDY, continuous_batching_config=config, progress_bar=False
    )
    assert not any(request.error for request in found.values())
    return [request.generated_tokens for request in found.values()]


def alone(model, prompts=PROMPTS):
    return [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.works_with("transformers", "`generate_batch` writes what `generate` does")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_batch_generates_what_each_of_its_prompts_does_alone(tiny, family, conversion):
    changes = {"sliding_window": 5} if family == "mistral" else {}
    model = convert(tiny(family, **changes), **conversion)
    assert batched(model) == alone(model)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_kernels_read_the_pages_where_they_are(tiny, family, monkeypatch):
    documents = []
    decode = pages.native_decode
    monkeypatch.setattr(
        pages, "native_decode", lambda q, *args: documents.append(q.shape[1]) or decode(q, *args)
    )
    changes = {"sliding_window": 5} if family == "mistral" else {}
    model = convert(tiny(family, **changes), attention=TWO_STAGE)
    assert batched(model) == alone(model)
    # Sliding windows are copied: what is new in them may overwrite what is old.
    assert len(PROMPTS) in documents if family == "llama" else documents == []


@pytest.mark.parametrize(
    "padding",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"kv_padding_interval_size": 64},
        {"varlen_compile_config": CompileConfig()},
        {"default_compile_level": 1},
    ],
)
def test_steps_with_padding_are_refused(tiny, padding):
    model = convert(tiny(), attention=QUERY_NORM)
    (name,) = padding
    with pytest.raises(ValueError, match=f"{name} is .* has padding in its row of tokens"):
        batched(model, config=ContinuousBatchingConfig(**padding))


def test_heads_that_are_off_change_the_text(tiny):
    """So that the equality above is not that of dense models."""
    model = convert(tiny(), attention=replace(QUERY_NORM, shared=0, active=2))
    assert batched(model) == alone(model) != alone(tiny())


def test_the_attention_is_ours_before_and_after(tiny, ids):
    model = convert(tiny(), attention=TWO_STAGE)
    before = model(ids).logits
    batched(model)
    assert model.config._attn_implementation == "headwise"
    assert torch.equal(model(ids).logits, before)


def test_a_manager_that_is_kept_goes_on(tiny):
    model = convert(tiny(), attention=TWO_STAGE)
    expected = alone(model)
    for _ in range(2):
        found = model.generate_batch(
            PROMPTS, generation_config=GREEDY, continuous_batching_config=PAGES,
            progress_bar=False, persistent_manager=True,
        )  # fmt: skip
        assert [request.generated_tokens for request in found.values()] == expected
    model.destroy_cached_continuous_batching_manager()
