"""torch.compile equals eager, forward and gradients: layers in one graph, converted models too."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from compile_check import CASES, NATIVE_CASES

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each case, all compiled in one process without jaxtyping's checks."""
    cases = [case for case in CASES if HAS_COMPILER or "inductor" not in case]
    return compiled(cases)


def compiled(cases: Iterable[str]) -> dict[str, str]:
    command = [sys.executable, Path(__file__).with_name("compile_check.py"), *cases]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case, outcomes):
    if case not in outcomes:
        pytest.skip("inductor needs a C++ compiler")
    assert outcomes[case] == ""


@pytest.mark.usefixtures("native_kernels")
def test_native_kernels_compiled_equal_eager():
    assert compiled(NATIVE_CASES) == dict.fromkeys(NATIVE_CASES, "")
