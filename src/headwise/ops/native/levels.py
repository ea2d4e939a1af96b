"""The levels of processors that a wheel has kernels for, and how they are compiled.

    avx2           x86-64-v3: Intel from 2013, AMD from 2015
    avx512         x86-64-v4: Intel's servers from 2017, AMD from 2022
    avx512_bf16    the same with products of bfloat16: Intel's servers from 2023, AMD from 2022

Matrix tiles (AMX) are no level: where processor and torch have them, the last one multiplies
bfloat16 by torch's product for them (kernels/products.h).
"""

import platform
from collections.abc import Iterator
from pathlib import Path

import torch

FLAGS = [
    "-std=c++20", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-fvisibility=hidden", "-shared",
    # Of torch's interface, what 2.11 has.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # fmt: skip
# What this machine has.
NATIVE = ["-march=native"]
_V3 = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_V4 = (*_V3, *(f"avx512_{part}" for part in ("f", "bw", "cd", "dq", "vl")))
# By level, best first: the flags, and what torch.cpu.get_capabilities must report. It asks the
# system too, which has to save the wider registers.
LEVELS = {
    "avx512_bf16": (["-march=x86-64-v4", "-mavx512bf16"], (*_V4, "avx512_bf16")),
    "avx512": (["-march=x86-64-v4"], _V4),
    "avx2": (["-march=x86-64-v3"], _V3),
}


def levels_here() -> Iterator[str]:
    """The levels that this processor and system offer, best first."""
    has = torch.cpu.get_capabilities()
    for level, (_, needs) in LEVELS.items():
        if platform.machine() in ("x86_64", "AMD64") and all(has.get(name) for name in needs):
            yield level


def cpuinfo() -> str:
    """What Linux says of the processors; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def instructions() -> str:
    """What the processor knows: Linux's line of it, "flags", on Arm "Features"."""
    lines = cpuinfo().splitlines()
    known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {known}"
