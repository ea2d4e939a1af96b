"""Times of the Triton kernels for many tilings: the best are the tables in ops.

python benchmarks/gpu/tiles.py OUTPUT.csv [KERNEL ...]
"""

import csv
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from headwise.ops.attention import triton as kernels
from headwise.ops.attention import triton_decode
from headwise.ops.experts import triton as experts

LENGTH, HEADS = 16384, 16
Tiling, usual_tiling = kernels.Tiling, kernels.tiling
# Kernel, channels, tiling.
Candidate = tuple[str, int, Tiling]
CANDIDATES: list[Candidate] = [
    *(("forward", 64, Tiling(*x)) for x in product((64, 128), (64, 128), (4, 8), (2, 3))),
    ("forward", 64, Tiling(128, 64, 4, 4)),
    *(("forward", 128, Tiling(*x)) for x in product((64,), (64, 128), (4,), (2, 3))),
    *(("forward", 128, Tiling(*x)) for x in product((128,), (64, 128), (8,), (2, 3))),
    *(("queries", 64, Tiling(*x)) for x in product((64,), (64, 128), (4,), (2, 3))),
    *(("queries", 64, Tiling(*x)) for x in product((128,), (64, 128), (8,), (2, 3))),
    *(("queries", 128, Tiling(*x)) for x in product((64,), (32, 64), (4,), (2, 3))),
    *(("queries", 128, Tiling(*x)) for x in product((128,), (32, 64), (8,), (2, 3))),
    *(("keys", 64, Tiling(*x)) for x in product((64,), (32, 64), (4,), (2, 3))),
    *(("keys", 64, Tiling(*x)) for x in product((128,), (32, 64, 128), (8,), (2, 3))),
    *(("keys", 128, Tiling(*x)) for x in product((64,), (32, 64), (4, 8), (2, 3))),
    *(("keys", 128, Tiling(*x)) for x in product((128,), (32, 64), (8,), (2, 3))),
    *(("experts", 256, Tiling(*x)) for x in product((64, 128), (32, 64), (4, 8), (2, 3))),
    *(("experts", 128, Tiling(*x)) for x in product((64, 128), (64, 128), (4, 8), (2, 3))),
]


# Keys of a step of decoding, programs that share the work, most of them a head.
DECODING = [*product((32, 64, 128), (512, 1024, 2048, 4096), (64,)), (64, 2048, 16)]


def main(path: Path, chosen: list[str]) -> None:
    """Compile all of them side by side, then time one after the other; rows as they come."""
    candidates = [each for each in CANDIDATES if not chosen or each[0] in chosen]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=spawn) as pool:
        errors = list(pool.map(compiled, candidates))
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        for candidate, error in zip(candidates, errors, strict=True):
            kernel, channels, tiling = candidate
            # Of a backward both kernels count, the other one as it is.
            result = error or f"{median(call(candidate)):.4f}"
            rows.writerow([kernel, channels, *tiling, result])
            print(kernel, channels, *tiling, result, flush=True)
        decoded = DECODING if not chosen or "decode" in chosen else []
        for batch, sizes in product((1, 16, 64), decoded):
            result = f"{median(decoding(batch, *sizes)):.4f}"
            rows.writerow([f"decode of {batch}", 128, *sizes, "", result])
            print("decode of", batch, *sizes, result, flush=True)


def compiled(candidate: Candidate) -> str:
    """Compile and run once; returns what went wrong, nothing if nothing did."""
    try:
        call(candidate)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    return ""


def median(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    with torch.no_grad():
        return float(do_bench(run, warmup=20, rep=80, return_mode="median"))


def call(candidate: Candidate) -> Callable[[], Any]:
    """A call of the op with the kernel so tiled: half of the heads on, causal, bfloat16."""
    kernel, channels, tiling = candidate
    if kernel == "experts":
        return experts_call(channels, tiling)

    def chosen(width: int, dtype: torch.dtype, name: str) -> Tiling:
        return tiling if name == kernel else usual_tiling(width, dtype, name)  # type: ignore[arg-type]

    kernels.tiling = chosen
    q, k, v, gate = inputs(1, LENGTH, LENGTH, channels)
    options = True, None, None, channels**-0.5
    if kernel == "forward":
        return partial(kernels.triton_attention, q, k, v, gate, *options)
    y, lse = kernels.triton_attention(q, k, v, gate, *options)
    dy = torch.randn_like(y)
    return partial(kernels.triton_attention_backward, dy, q, k, v, gate, y, lse, *options)


def experts_call(channels: int, tiling: Tiling) -> Callable[[], Any]:
    """96 experts of 512 hidden units, three for each of 49,152 rows."""
    experts.tiling = lambda _: tiling
    torch.manual_seed(0)
    x, up, down = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 16
        for shape in ((3 * LENGTH, channels), (96, 1024, channels), (96, channels, 512))
    )
    weights, indices = torch.rand(3 * LENGTH, 96, device="cuda").topk(3)
    return partial(experts.expert_mlp, x, weights, indices, up, down, "silu")


def decoding(batch: int, block: int, programs: int, splits: int) -> Callable[[], Any]:
    """One token of each sequence on a cache of 8,192, laid out as transformers does."""
    triton_decode.block_of_keys = lambda *_: block
    triton_decode.PROGRAMS, triton_decode.MAX_SPLITS = programs, splits
    q, k, v, gate = inputs(batch, 1, 8192, 128)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    return partial(triton_decode.triton_decode, q, k, v, gate, True, None, None, 128**-0.5)


def inputs(batch: int, tokens: int, keys: int, channels: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, HEADS, channels, device="cuda", dtype=torch.bfloat16)
        for length in (tokens, keys, keys)
    )
    best = torch.rand(batch, tokens, HEADS, device="cuda").topk(HEADS // 2, dim=-1).indices
    return q, k, v, torch.zeros(batch, tokens, HEADS, device="cuda").scatter_(2, best, 1.0)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("not measured: no CUDA device")
    main(Path(sys.argv[1]), sys.argv[2:])
