"""Exported programs equal the eager modules at other sizes: torch.export, AOTInductor, ONNX."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch.utils import _pytree

import export_check
from headwise.ops import route_heads, route_tokens

# What stands for all in `make test`.
SHORT = (
    "two_stage", "query_norm", "mh_moe", "mh_moe, learns", "documents", "llama, query_norm",
    "static cache, two_stage",
)  # fmt: skip
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def outcomes(cases: Iterable[str]) -> dict[str, str]:
    """What became of each case, all in one process without jaxtyping's checks."""
    command = [sys.executable, export_check.__file__, *cases]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def exported() -> dict[str, str]:
    return outcomes(SHORT)


@pytest.fixture(scope="module")
def others_exported() -> dict[str, str]:
    return outcomes(case for case in export_check.CASES if case not in SHORT)


@pytest.fixture(scope="module")
def packaged() -> dict[str, str]:
    if not HAS_COMPILER:
        pytest.skip("AOTInductor needs a C++ compiler")
    return outcomes(export_check.PACKAGES)


@pytest.fixture(scope="module")
def in_onnx() -> dict[str, str]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"ONNX needs the package {package}")
    return outcomes(export_check.ONNX)


@pytest.mark.works_with("torch.export", "batch size and length open")
@pytest.mark.parametrize("case", SHORT)
def test_a_program_equals_eager(case, exported):
    assert exported[case] == ""


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in export_check.CASES if case not in SHORT])
def test_other_programs_equal_eager(case, others_exported):
    assert others_exported[case] == ""


@pytest.mark.long
@pytest.mark.usefixtures("kernels_built")
def test_a_program_equals_eager_by_kernels_and_without():
    cases = export_check.EVEN_CASES
    assert outcomes(cases) == dict.fromkeys(cases, "")


@pytest.mark.long
@pytest.mark.works_with("AOTInductor", "a package that C++ loads")
@pytest.mark.parametrize("case", export_check.PACKAGES)
def test_a_package_of_aotinductor_equals_eager(case, packaged):
    assert packaged[case] == ""


@pytest.mark.long
@pytest.mark.works_with("ONNX Runtime", "a file of `torch.onnx.export`")
@pytest.mark.parametrize("case", export_check.ONNX)
def test_onnx_equals_eager(case, in_onnx):
    assert in_onnx[case] == ""


@pytest.mark.long
@pytest.mark.parametrize("kind", export_check.EXPORTERS)
def test_transformers_own_exporters(kind):
    pytest.importorskip("transformers.exporters", reason="transformers has no exporters yet")
    if kind == "Onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"ONNX needs the package {package}")
    assert outcomes([kind]) == {kind: ""}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("of", ["heads", "experts"])
def test_the_structure_of_a_routing_survives_being_written_as_json(of, padded):
    logits = torch.randn(3, 2), torch.randn(3, 5), torch.randn(3, 2)
    routing = route_heads(*logits, top_k=2) if of == "heads" else route_tokens(logits[1], top_k=2)
    if padded:
        routing = routing.with_mask(torch.tensor([True, False, True]))
    leaves, structure = _pytree.tree_flatten({"of a layer": routing})
    read = _pytree.treespec_loads(_pytree.treespec_dumps(structure))
    again = _pytree.tree_unflatten(leaves, read)["of a layer"]
    assert type(again) is type(routing)
    assert all(x is y for x, y in zip(again, routing, strict=True))
