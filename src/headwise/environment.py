"""What there is on this machine: versions, processor, GPUs, kernels, extras; and what is missing.

`headwise env` prints it, for its user and for reports of bugs.
"""

import os
import platform
import shutil
import subprocess
import textwrap
import warnings
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement

from headwise.ops import native
from headwise.ops.native.build import missing_tools
from headwise.results.rows import device_name

# What torch.cpu.get_capabilities calls them, and everybody else.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16",
    "neon": "NEON", "bf16": "BF16", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip
_ALL_IS_THERE = "nothing: all is there"


@dataclass(frozen=True)
class Processor:
    """A processor: its logical cores, those this process may use, the threads that torch starts."""

    name: str
    cores: int
    usable_cores: int
    threads: int
    instructions: list[str]


@dataclass(frozen=True)
class GPU:
    """A GPU that torch can use."""

    name: str
    memory_gib: float
    capability: str


@dataclass(frozen=True)
class CPUKernels:
    """Where the C++ kernels are, built for this torch and processor; or why there are none."""

    library: str | None
    missing: str
    missing_tools: list[str]


@dataclass(frozen=True)
class Environment:
    """What `headwise env` says.

    Args:
        headwise: Version of this library.
        python: Version of Python.
        system: Operating system, with its version.
        packages: Version of each package that headwise needs, and of triton; None where missing.
        torch_for: What torch was built for: CPUs, a version of CUDA or of ROCm.
        processor: The processor.
        gpus: GPUs that torch can use.
        driver: Version of NVIDIA's driver, whether torch can use its GPUs or not.
        cpu_kernels: The C++ kernels. Those for GPUs are Triton's, which are built as they are used.
        extras: Whether what an extra of the package brings is installed.
    """

    headwise: str
    python: str
    system: str
    packages: dict[str, str | None]
    torch_for: str
    processor: Processor
    gpus: list[GPU]
    driver: str | None
    cpu_kernels: CPUKernels
    extras: dict[str, bool]


def environment() -> Environment:
    """What there is on this machine."""
    from headwise import __version__

    core, extras = _requirements()
    return Environment(
        headwise=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        packages={name: _version(name) for name in (*sorted(x.name for x in core), "triton")},
        torch_for=_torch_for(),
        processor=_processor(),
        gpus=_gpus(),
        driver=_driver(),
        cpu_kernels=_cpu_kernels(),
        extras={name: all(map(_is_installed, brings)) for name, brings in extras.items()},
    )


def faster(here: Environment) -> str:
    """What would make it faster here, in a line."""
    kernels = here.cpu_kernels
    if here.gpus:
        return _ALL_IS_THERE if here.packages["triton"] else "triton, whose kernels skip heads"
    if here.driver and here.torch_for == "CPUs":
        return "a torch for GPUs: a GPU is here, and this torch is built for CPUs"
    if here.driver:
        return (
            f"the GPU, which torch cannot use: driver {here.driver} is too old for "
            f"{here.torch_for}, or CUDA_VISIBLE_DEVICES hides it"
        )
    if kernels.library:
        return _ALL_IS_THERE
    if kernels.missing_tools:
        return f"CPU kernels: install {' and '.join(kernels.missing_tools)}, run `headwise compile`"
    return f"CPU kernels: {kernels.missing}"


def in_words(here: Environment) -> str:
    """A line or a few on each, for a terminal."""
    packages = [f"{x}=={version}" if version else f"no {x}" for x, version in here.packages.items()]
    processor, kernels = here.processor, here.cpu_kernels
    triton = here.packages["triton"]
    lines = {
        "headwise": here.headwise,
        "python": f"{here.python} on {here.system}",
        "packages": ", ".join(packages),
        "torch": f"built for {here.torch_for}",
        "processor": "; ".join(
            [
                processor.name,
                f"{processor.usable_cores} of {processor.cores} cores usable, torch uses "
                f"{processor.threads}",
                ", ".join(processor.instructions) or "no instruction set that matters",
            ]
        ),
        "GPU": "; ".join(map(_gpu_in_words, here.gpus)) or "none that torch can use",
        "driver": f"NVIDIA {here.driver}" if here.driver else "none of NVIDIA's",
        "CPU kernels": kernels.library or f"none: {kernels.missing}",
        "GPU kernels": f"by triton {triton}, built as used" if triton else "none without triton",
        "extras": ", ".join(name for name, there in here.extras.items() if there) or "none",
        "not there": ", ".join(
            f"pip install 'headwise[{name}]'" for name, there in here.extras.items() if not there
        ),
        "faster with": faster(here),
    }
    return "\n".join(_wrapped(name, text) for name, text in lines.items() if text)


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the installed package needs on this system, and what each of its extras adds."""
    try:
        about = metadata.metadata("headwise")
    except metadata.PackageNotFoundError:  # run from a path, without being installed
        return [Requirement("torch"), Requirement("transformers")], {}
    all_of_them = [Requirement(text) for text in about.get_all("Requires-Dist") or []]

    def needed(extra: str) -> list[Requirement]:
        return [x for x in all_of_them if not x.marker or x.marker.evaluate({"extra": extra})]

    core = needed("")
    extras = about.get_all("Provides-Extra") or []
    return core, {name: [x for x in needed(name) if x not in core] for name in extras}


def _is_installed(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"


def _processor() -> Processor:
    knows = torch.cpu.get_capabilities()
    cores = os.cpu_count() or 1
    return Processor(
        name=device_name(cuda=False),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        threads=torch.get_num_threads(),
        instructions=[name for key, name in _INSTRUCTIONS.items() if knows.get(key)],
    )


def _gpus() -> list[GPU]:
    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [_gpu(torch.cuda.get_device_properties(index)) for index in range(count)]


def _gpu(about: torch.cuda._CudaDeviceProperties) -> GPU:
    memory = round(about.total_memory / 2**30, 1)
    return GPU(about.name, memory, f"{about.major}.{about.minor}")


def _gpu_in_words(gpu: GPU) -> str:
    return f"{gpu.name}, {gpu.memory_gib} GiB, capability {gpu.capability}"


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.partition("\n")[0].strip() or None


def _cpu_kernels() -> CPUKernels:
    library = native.library()
    return CPUKernels(
        library=str(library) if library else None,
        missing=native.what_is_missing(),
        missing_tools=[] if library else missing_tools(),
    )


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(
        text, 100, initial_indent=f"{name:13}", subsequent_indent=" " * 13,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
