"""Generates by vLLM what a converted model generates by itself; prints what differs as JSON.

Run by test_vllm.py in a process of its own: vLLM changes the process that it runs in. Without a
GPU and with a vLLM that was built for one, the operators that its CPU backend has in C++ are
written in torch here; all else is vLLM's own.
"""

import json
import os
import sys
import tempfile
from itertools import pairwise

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import headwise

SIZES = {
    "vocab_size": 61, "hidden_size": 96, "intermediate_size": 53, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TWO_STAGE = headwise.MoHConfig(shared=2, active=4, router="two_stage", router_std=0.5)
QUERY_NORM = headwise.MoHConfig(shared=2, active=4, router="query_norm")
EXPERTS = headwise.MHMoEConfig(num_heads=4, num_experts=7, top_k=2, expert_dim=11)
CASES = {
    "two_stage, compiled": (LlamaForCausalLM, LlamaConfig, {}, {"attention": TWO_STAGE}),
    "query_norm": (LlamaForCausalLM, LlamaConfig, {}, {"attention": QUERY_NORM}),
    "sliding window, one layer": (
        MistralForCausalLM, MistralConfig, {"sliding_window": 5},
        {"attention": TWO_STAGE, "layers": [1]},
    ),
    "heads and experts, compiled": (
        LlamaForCausalLM, LlamaConfig, {}, {"attention": TWO_STAGE, "mlp": EXPERTS}
    ),
}  # fmt: skip
DICE = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(3, 61, (n,), generator=DICE).tolist() for n in (5, 19, 1, 41)]


def run_on_this_cpu() -> None:
    """Choose vLLM's CPU backend, and give it the operators that it lacks."""
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    import vllm._custom_ops as ops

    if hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return
    ops.cpu_attn_get_scheduler_metadata = lambda **_: torch.zeros(1)
    ops.cpu_attn_reshape_and_cache = keep
    ops.cpu_attention_with_kv_cache = attend
    # The library lives as long as its operators are wanted.
    run_on_this_cpu.library = library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in (
        ("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None),
        ("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1)),
        # What samples; the warming up calls it, and nothing here.
        ("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor",
         lambda logits, seeds: logits.argmax(-1)),
        ("compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor pages, "
         "Tensor(a!) slots, int size) -> ()", find_slots),
    ):  # fmt: skip
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")


def find_slots(starts: Tensor, positions: Tensor, pages: Tensor, slots: Tensor, size: int) -> None:
    """Where the key of each token goes: a place in a page of its request."""
    slots.fill_(-1)
    for request, (begin, end) in enumerate(pairwise(starts.tolist())):
        own = positions[begin:end]
        slots[begin:end] = pages[request, own // size].long() * size + own % size


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_, **__) -> None:
    """Keys and values [T, G, C] go to the pages [P, G, size, C]."""
    size = keys.shape[2]
    real = slots[: len(key)] >= 0
    page, place = slots[: len(key)][real] // size, slots[: len(key)][real] % size
    keys[page, :, place], values[page, :, place] = key[real], value[real]


def attend(
    *, query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor, scale: float,
    query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, sliding_window: int, **_,
) -> None:  # fmt: skip
    """Attention of each request to its own pages."""
    bounds = pairwise(query_start_loc.tolist())
    for (begin, end), length, pages in zip(bounds, seq_lens.tolist(), block_table, strict=False):
        rows = pages[: -(-length // key_cache.shape[2])].long()
        q = query[begin:end].transpose(0, 1)
        k, v = (x[rows].transpose(0, 1).flatten(1, 2)[:, :length] for x in (key_cache, value_cache))
        seen = torch.ones(q.shape[1], length, dtype=torch.bool).tril(length - q.shape[1])
        if sliding_window > 0:
            seen &= seen.tril(length - q.shape[1] - sliding_window).logical_not()
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        output[begin:end] = y.transpose(0, 1).reshape(output[begin:end].shape)


def check(case: str) -> dict[str, object]:
    """The tokens of both, and by how much their log probabilities differ."""
    model_class, config_class, changes, conversion = CASES[case]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(6)
    dense = [generated(model, prompt)[0] for prompt in PROMPTS]
    headwise.convert(model, **conversion)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    if not torch.cuda.is_available():
        run_on_this_cpu()
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        # Fewer tokens at once than the prompts have, so that one of them is read in pieces.
        engine = LLM(
            model=directory, skip_tokenizer_init=True, dtype="float32", max_model_len=128,
            max_num_batched_tokens=16, enforce_eager="compiled" not in case,
        )  # fmt: skip
        sampling = SamplingParams(temperature=0, max_tokens=11, logprobs=1, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        found = [one.outputs[0] for one in engine.generate(prompts, sampling)]
    differences = [
        abs(of_token[token].logprob - expected_one)
        for one, (_, log_probabilities) in zip(found, expected, strict=True)
        for token, of_token, expected_one in zip(
            one.token_ids, one.logprobs, log_probabilities, strict=True
        )
    ]
    return {
        "by vLLM": [list(one.token_ids) for one in found],
        "by itself": [tokens for tokens, _ in expected],
        "dense": dense,
        "difference": max(differences),
    }


def generated(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """What the model writes after a prompt, and the log probability of each token."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=11, do_sample=False)
    with torch.no_grad():
        chances = model(ids).logits[0].log_softmax(-1)
    new = ids[0, len(prompt) :]
    return new.tolist(), chances[len(prompt) - 1 : -1].gather(1, new[:, None])[:, 0].tolist()


if __name__ == "__main__":
    result = json.dumps(check(sys.argv[1]))
    with open(sys.argv[2], "w") as file:
        file.write(result)
