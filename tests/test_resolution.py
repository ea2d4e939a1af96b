"""What pyproject.toml and constraints.txt ask for can be installed, on every Python and system."""

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv.exe" if sys.platform == "win32" else "uv")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = (
    "x86_64-manylinux_2_28",
    "aarch64-manylinux_2_28",
    "aarch64-apple-darwin",
    "x86_64-pc-windows-msvc",
)
EVERYWHERE = list(product(PYTHONS, SYSTEMS))
# lm-eval depends on three packages that are published as source; all others must have a wheel.
SOURCE_ONLY = ("rouge-score", "sqlitedict", "word2number")
UNREACHABLE = ("error sending request", "timed out")


def resolve(python: str, system: str, *options: str, project: Path = ROOT) -> dict[str, str]:
    """The version of each package that uv would install for headwise with all of its extras.

    What installs with every extra also installs with none, or with any of them: a part of a
    solution is a solution.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    # How uv learns of the oldest macOS that a wheel must run on.
    environment["MACOSX_DEPLOYMENT_TARGET"] = "14.0"
    command = [
        *(UV, "pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate"),
        *("--all-extras", "--python-version", python, "--python-platform", system),
        *("--only-binary", ":all:", *(word for p in SOURCE_ONLY for word in ("--no-binary", p))),
        *(*options, "pyproject.toml"),
    ]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode and any(sign in done.stderr.lower() for sign in UNREACHABLE):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, f"Python {python}, {system}: {done.stderr}"
    return dict(line.split("==") for line in done.stdout.splitlines())


def resolve_all(places: Iterable[tuple[str, str]], *options: str) -> list[dict[str, str]]:
    """Side by side: most of the time goes into asking the registry."""
    with ThreadPoolExecutor(max_workers=6) as pool:
        return list(pool.map(lambda place: resolve(*place, *options), places))


@pytest.fixture(autouse=True)
def _uv():
    if not UV.exists():
        pytest.skip("no uv beside this Python")


@pytest.mark.long
def test_the_newest_can_be_installed():
    assert all("torch" in versions for versions in resolve_all(EVERYWHERE))


@pytest.mark.long
def test_what_was_tested_can_be_installed():
    """With constraints.txt, which names every version that counts."""
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    for versions in resolve_all(EVERYWHERE, "--constraints", "constraints.txt"):
        assert {"torch", "transformers", "numpy"} <= versions.keys()
        assert {name: v for name, v in versions.items() if v != pins.get(name, v)} == {}


@pytest.mark.long
def test_the_lowest_can_be_installed():
    places = [(python, SYSTEMS[0]) for python in PYTHONS]
    for versions in resolve_all(places, "--resolution", "lowest-direct"):
        assert versions["torch"] == "2.11.0"


def test_what_cannot_be_installed_fails(tmp_path):
    """A version that nobody published is an error of the resolution, not a reason to skip."""
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"einops>=', '"einops>=1000'))
    with pytest.raises(AssertionError, match=r"einops"):
        resolve("3.11", SYSTEMS[0], project=tmp_path)
