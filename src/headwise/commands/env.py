"""`headwise env`: what there is on this machine: for its user and for reports of bugs."""

import os
import platform
import shutil
import subprocess
import textwrap
import warnings
from importlib import metadata
from json import dumps
from typing import Any

import torch
from packaging.requirements import Requirement

from headwise.ops import native
from headwise.ops.native.build import missing_tools
from headwise.parsing import called
from headwise.results.rows import device_name

# What torch.cpu.get_capabilities calls them, and everybody else.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16",
    "neon": "NEON", "bf16": "BF16", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip
_ALL_IS_THERE = "nothing: all is there"


def main(argv: list[str]) -> None:
    """Run the command."""
    called(env, argv, "headwise env")


def env(json: bool = False) -> None:
    """Say what there is on this machine, and what would make it faster: for reports of bugs.

    Args:
        json: Print it as JSON.
    """
    here = environment()
    if json:
        print(dumps({**here, "faster": faster(here)}, indent=1))
    else:
        print(in_words(here))


def environment() -> dict[str, Any]:
    """What there is on this machine, of plain types.

    `packages` has the version of each package that headwise needs, and of triton; None where it is
    missing. `torch_for` is what torch was built for. `usable_cores` are those that this process may
    use, `threads` those that torch starts, `gpus` those that torch can use. `driver` is the version
    of NVIDIA's, whether torch can use its GPUs or not. `cpu_kernels` says where the C++ kernels
    are, built for this torch and processor, or why there are none; those for GPUs are Triton's,
    which are built as they are used. `extras` says whether what an extra of the package brings is
    installed.
    """
    from headwise import __version__

    core, extras = _requirements()
    cores, library = os.cpu_count() or 1, native.library()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    knows = torch.cpu.get_capabilities()
    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "headwise": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in (*sorted(x.name for x in core), "triton")},
        "torch_for": f"ROCm {torch.version.hip}" if torch.version.hip else cuda,
        "processor": {
            "name": device_name(cuda=False),
            "cores": cores,
            "usable_cores": usable,
            "threads": torch.get_num_threads(),
            "instructions": [name for key, name in _INSTRUCTIONS.items() if knows.get(key)],
        },
        "gpus": [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in gpus
        ],
        "driver": _driver(),
        "cpu_kernels": {
            "library": str(library) if library else None,
            "missing": native.what_is_missing(),
            "missing_tools": "" if library else missing_tools(),
        },
        "extras": {name: all(map(_is_installed, brings)) for name, brings in extras.items()},
    }


def faster(here: dict[str, Any]) -> str:
    """What would make it faster here, in a line."""
    kernels, driver = here["cpu_kernels"], here["driver"]
    if here["gpus"]:
        return _ALL_IS_THERE if here["packages"]["triton"] else "triton, whose kernels skip heads"
    if driver and here["torch_for"] == "CPUs":
        return "a torch for GPUs: a GPU is here, and this torch is built for CPUs"
    if driver:
        return (
            f"the GPU, which torch cannot use: driver {driver} is too old for "
            f"{here['torch_for']}, or CUDA_VISIBLE_DEVICES hides it"
        )
    if kernels["library"]:
        return _ALL_IS_THERE
    if tools := kernels["missing_tools"]:
        return f"CPU kernels: install {tools}, run `headwise compile`"
    return f"CPU kernels: {kernels['missing']}"


def in_words(here: dict[str, Any]) -> str:
    """A line or a few on each, for a terminal."""
    processor, kernels = here["processor"], here["cpu_kernels"]
    triton = here["packages"]["triton"]
    lines = {
        "headwise": here["headwise"],
        "python": f"{here['python']} on {here['system']}",
        "packages": ", ".join(f"{x}=={v}" if v else f"no {x}" for x, v in here["packages"].items()),
        "torch": f"built for {here['torch_for']}",
        "processor": f"{processor['name']}; "
        f"{processor['usable_cores']} of {processor['cores']} cores usable, torch uses "
        f"{processor['threads']}; "
        + (", ".join(processor["instructions"]) or "no instruction set that matters"),
        "GPU": "; ".join(
            f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
            for gpu in here["gpus"]
        )
        or "none that torch can use",
        "driver": f"NVIDIA {here['driver']}" if here["driver"] else "none of NVIDIA's",
        "CPU kernels": kernels["library"] or f"none: {kernels['missing']}",
        "GPU kernels": f"by triton {triton}, built as used" if triton else "none without triton",
        "extras": ", ".join(name for name, there in here["extras"].items() if there) or "none",
        "not there": ", ".join(
            f"pip install 'headwise[{name}]'" for name, there in here["extras"].items() if not there
        ),
        "faster with": faster(here),
    }
    wrap = textwrap.TextWrapper(
        100, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.fill(f"{name:13}{text}") for name, text in lines.items() if text)


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
