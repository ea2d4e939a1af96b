"""torch.compile equals eager, forward and gradients: layers in one graph, converted models too."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from compile_check import CASES, NATIVE_CASES

# What others stand for in `make test`: each is one more router, or one more compiler.
LONG = (
    "two_stage, inductor", "moe, inductor", "model, query_norm", "model, fitted",
    "generating, two_stage", "generating, fitted",
)  # fmt: skip
NATIVE_LONG = ("native model, two_stage", "native model, fitted")
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return compiled(case for case in CASES if case not in LONG)


@pytest.fixture(scope="module")
def outcomes_of_long() -> dict[str, str]:
    return compiled(LONG)


def compiled(cases: Iterable[str]) -> dict[str, str]:
    """What became of each case, all compiled in one process without jaxtyping's checks."""
    cases = [case for case in cases if HAS_COMPILER or "inductor" not in case]
    command = [sys.executable, Path(__file__).with_name("compile_check.py"), *cases]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", [case for case in CASES if case not in LONG])
def test_compiled_equals_eager(case, outcomes):
    if case not in outcomes:
        pytest.skip("inductor needs a C++ compiler")
    assert outcomes[case] == ""


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_others_compiled_equal_eager(case, outcomes_of_long):
    if case not in outcomes_of_long:
        pytest.skip("inductor needs a C++ compiler")
    assert outcomes_of_long[case] == ""


@pytest.mark.usefixtures("native_kernels")
def test_native_kernels_compiled_equal_eager():
    cases = [case for case in NATIVE_CASES if case not in NATIVE_LONG]
    assert compiled(cases) == dict.fromkeys(cases, "")


@pytest.mark.long
@pytest.mark.usefixtures("native_kernels")
def test_other_routers_with_native_kernels_compiled_equal_eager():
    assert compiled(NATIVE_LONG) == dict.fromkeys(NATIVE_LONG, "")
