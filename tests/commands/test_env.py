"""`headwise env`: what is here, and the one line on what is missing."""

import json
import sys
from email.message import Message
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import headwise
from headwise.cli import main
from headwise.commands import env as module
from headwise.commands.env import environment, faster, in_words
from headwise.ops import native

HERE = {
    "headwise": "0.1.0", "python": "3.11.7", "system": "Linux",
    "packages": {"numpy": "2.4.0", "torch": "2.13.0", "triton": None}, "torch_for": "CPUs",
    "processor": {
        "name": "Xeon", "cores": 8, "usable_cores": 4, "threads": 2, "instructions": ["AVX2"],
    },
    "gpus": [], "driver": None,
    "cpu_kernels": {"library": "/kernels.so", "missing": "", "missing_tools": []},
    "extras": {"eval": False, "compile": True},
}  # fmt: skip
H100 = {"name": "H100", "memory_gib": 79.6, "capability": "9.0"}
NO_KERNELS = {
    "library": None,
    "missing": "they are not built; run `headwise compile` once",
    "missing_tools": [],
}
NO_TOOLS = NO_KERNELS | {"missing_tools": "a C++ compiler (c++)"}


def test_what_is_here_is_what_others_say():
    here = environment()
    assert (here["headwise"], here["python"]) == (headwise.__version__, sys.version.split()[0])
    assert here["packages"]["torch"] == metadata.version("torch")
    assert here["packages"]["numpy"] == metadata.version("numpy")
    assert here["processor"]["threads"] == torch.get_num_threads()
    avx2 = torch.cpu.get_capabilities().get("avx2", False)
    assert ("AVX2" in here["processor"]["instructions"]) == avx2
    assert len(here["gpus"]) == torch.cuda.device_count()
    assert set(here["extras"]) == set(metadata.metadata("headwise").get_all("Provides-Extra"))
    assert (here["cpu_kernels"]["library"] is not None) == native.is_built()


def test_both_forms_say_the_same(capsys):
    main(["env", "--json"])
    printed = json.loads(capsys.readouterr().out)
    here = environment()
    assert printed == {**here, "faster": faster(here)}
    main(["env"])
    assert capsys.readouterr().out == in_words(here) + "\n"


def test_in_words():
    assert in_words(HERE).splitlines() == [
        "headwise     0.1.0",
        "python       3.11.7 on Linux",
        "packages     numpy==2.4.0, torch==2.13.0, no triton",
        "torch        built for CPUs",
        "processor    Xeon; 4 of 8 cores usable, torch uses 2; AVX2",
        "GPU          none that torch can use",
        "driver       none of NVIDIA's",
        "CPU kernels  /kernels.so",
        "GPU kernels  none without triton",
        "extras       compile",
        "not there    pip install 'headwise[eval]'",
        "faster with  nothing: all is there",
    ]


def test_gpus_in_words():
    here = HERE | {"gpus": [H100], "driver": "570.1"}
    assert "GPU          H100, 79.6 GiB, capability 9.0\n" in in_words(here)
    assert "driver       NVIDIA 570.1\n" in in_words(here)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing: all is there"),
        ({"cpu_kernels": NO_KERNELS}, "CPU kernels: they are not built; run `headwise compile`"),
        (
            {"cpu_kernels": NO_TOOLS},
            "CPU kernels: install a C++ compiler (c++), run `headwise compile`",
        ),
        ({"driver": "570.1"}, "a torch for GPUs: a GPU is here"),
        ({"driver": "470.1", "torch_for": "CUDA 13.0"}, "driver 470.1 is too old for CUDA 13.0"),
        ({"gpus": [H100], "cpu_kernels": NO_KERNELS}, "triton, whose kernels skip heads"),
        ({"gpus": [H100], "packages": {"triton": "3.7.1"}}, "nothing: all is there"),
    ],
)
def test_what_would_make_it_faster(changes, said):
    assert said in faster(HERE | changes)


def test_extras_are_read_from_the_package(monkeypatch):
    about = Message()
    for extra in ("new", "old", "none"):
        about["Provides-Extra"] = extra
    about["Requires-Dist"] = "torch>=2"
    about["Requires-Dist"] = 'numpy>=1; extra == "new"'
    about["Requires-Dist"] = 'numpy>=99; extra == "old"'
    about["Requires-Dist"] = 'no-such-package; extra == "none"'
    about["Requires-Dist"] = 'elsewhere; sys_platform == "nowhere" and extra == "new"'
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    here = environment()
    assert here["extras"] == {"new": True, "old": False, "none": False}
    assert list(here["packages"]) == ["torch", "triton"]


def test_run_from_a_path_without_being_installed(monkeypatch):
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", not_installed)
    here = environment()
    assert here["extras"] == {}
    assert here["packages"]["torch"] == metadata.version("torch")


def test_a_gpu_that_torch_can_use(monkeypatch):
    about = SimpleNamespace(name="H100", total_memory=int(79.6 * 2**30), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    assert environment()["gpus"] == [H100]


@pytest.mark.parametrize(
    ("script", "driver"),
    [("echo 570.1; echo 570.1", "570.1"), ("exit 9", None), ("echo", None)],
)
def test_the_driver_is_nvidias_word(script, driver, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: str(program))
    assert environment()["driver"] == driver


def test_help_of_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["env", "--help"])
    assert "usage: headwise env" in capsys.readouterr().out
