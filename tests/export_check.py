"""Exports layers and converted models; prints {case: "" or what went wrong} as JSON.

Run by test_export.py in a process of its own: torch.export cannot trace jaxtyping's checks.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.testing import assert_close
from transformers import GenerationConfig

import headwise
from compile_check import EXPERTS, HEADS, D
from export_modules import EVEN, LAYERS, Both, Logits, Step, llama, tokens
from headwise import MHMoE, MoHAttention
from headwise.ops import aggregated_attention, head_attention

B, T = 3, 7
OPEN = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
# Other sizes than the example's, from where kernels are faster on, and one.
SIZES = ((2, 11), (5, 131), (1, 1))


def inputs(module: nn.Module, batch: int, length: int, masked: bool = False) -> tuple[Tensor, ...]:
    if isinstance(module, Logits):
        return tokens(batch, length)
    x = torch.randn(batch, length, module.dim, dtype=next(module.parameters()).dtype)
    return (x, tokens(batch, length)[1].bool()) if masked else (x,)


def exported(module: nn.Module, masked: bool = False, strict: bool = False) -> ExportedProgram:
    """The program, of torch's own operators only, saved and loaded again."""
    example = inputs(module, B, T, masked)
    program = torch.export.export(
        module, example, dynamic_shapes=(OPEN,) * len(example), strict=strict
    )
    assert operators(program) <= {"aten"}, operators(program)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators(program: ExportedProgram) -> set[str]:
    """The libraries that the program's operators are from."""
    parts = program.graph_module.modules()
    graphs = [part.graph for part in parts if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes]
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}


def same(got: Any, want: Any) -> None:
    """Equal to 1e-5, and of the same types: a routing stays one."""
    assert type(got) is type(want), (type(got), type(want))
    if isinstance(want, tuple):
        for a, b in zip(got, want, strict=True):
            same(a, b)
    elif want is not None:
        assert_close(got, want, rtol=1e-5, atol=1e-5)


def equals_eager(program: Callable[..., Any], module: nn.Module, masked: bool = False) -> None:
    for batch, length in SIZES:
        arguments = inputs(module, batch, length, masked)
        same(program(*arguments), module(*arguments))


@torch.no_grad()
def layer(new: Callable[[], nn.Module], masked: bool = False, strict: bool = False) -> None:
    module = new().eval()
    equals_eager(exported(module, masked, strict).module(), module, masked)


def learns(name: str) -> None:
    """A program that was exported with gradients has the same gradients."""
    module = LAYERS[name]()
    program = exported(module).module()
    x = torch.randn(2, 11, module.dim)
    results = []
    for call in (program, module):
        y, routing = call(x)
        loss = y.square().sum() + headwise.balance_loss(routing)
        results.append(torch.autograd.grad(loss, list(call.parameters())))
    assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def named() -> None:
    """A named implementation is in the program; ours need headwise, the reference is refused."""
    aligned = {"num_experts": 7, "top_k": 2, "expert_dim": 16, "impl": "grouped_mm"}
    for module, libraries in (
        (MHMoE(D, num_heads=3, impl="grouped", **EXPERTS), {"aten", "headwise"}),
        (MoHAttention(D, **HEADS, impl="gathered"), {"aten", "headwise"}),
        (MHMoE(32, num_heads=2, **aligned).bfloat16(), {"aten"}),
    ):
        program = torch.export.export(module, inputs(module, B, T), dynamic_shapes=(OPEN,))
        assert operators(program) == libraries, operators(program)
        equals_eager(program.module(), module)
    for module in (
        MHMoE(D, num_heads=3, impl="reference", **EXPERTS),
        MoHAttention(D, **HEADS, impl="reference"),
    ):
        with pytest.raises(ValueError, match="cannot be exported"):
            torch.export.export(module, inputs(module, B, T))


@torch.no_grad()
def documents() -> None:
    """Documents in a row, two or more: where they begin is an input."""

    class Packed(nn.Module):
        def forward(self, x: Tensor, gate: Tensor, begins: Tensor) -> Tensor:
            return head_attention(x, x, x, gate, causal=True, window=3, cu_seqlens=begins)

    def example(*edges: int) -> tuple[Tensor, ...]:
        x = torch.randn(1, edges[-1], 3, 5)
        return x, torch.rand(1, edges[-1], 3).round(), torch.tensor(edges)

    open_length = {1: Dim.DYNAMIC}
    shapes = (open_length, open_length, {0: Dim.DYNAMIC})
    program = torch.export.export(Packed(), example(0, 2, 7), dynamic_shapes=shapes)
    assert operators(program) == {"aten"}
    for arguments in (example(0, 5, 6, 13), example(0, 6, 17)):
        assert_close(program.module()(*arguments), Packed()(*arguments))


@torch.no_grad()
def aggregated() -> None:
    class Aggregated(nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            pool, near = x[:, :7], torch.zeros(3, 9)
            return aggregated_attention(
                x, x, x, pool, pool, gate, size=(3, 5), window=3, local_bias=near, unit_q=x,
                pool_bias=torch.zeros(3, 15, 7), learned_tokens=torch.ones(3, 4, 9),
                learned_bias=near,
            )  # fmt: skip

    def example(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 15, 3, 4), torch.rand(batch, 15, 3).round()

    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(Aggregated(), example(2), dynamic_shapes=shapes)
    assert operators(program) == {"aten"}
    arguments = example(5)
    assert_close(program.module()(*arguments), Aggregated()(*arguments), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def static_cache(router: str, strict: bool) -> None:
    """transformers' own export with a static cache continues as generate does."""
    from transformers.integrations.executorch import (
        TorchExportableModuleWithStaticCache,
        convert_and_export_with_cache,
    )

    model = llama(router, mlp=True)
    cache = {"batch_size": 1, "max_cache_len": 16}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config=cache
    )
    program = convert_and_export_with_cache(model, strict=strict)
    assert operators(program) == {"aten"}
    want = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=5, do_sample=False)
    got = TorchExportableModuleWithStaticCache.generate(
        program, prompt_token_ids=torch.tensor([[3, 5, 7]]), max_new_tokens=5
    )
    assert torch.equal(got, want), (got, want)


@torch.no_grad()
def packaged(new: Callable[[], nn.Module], directory: str) -> None:
    module = new().eval()
    path = str(Path(directory) / "package.pt2")
    torch._inductor.aoti_compile_and_package(exported(module), package_path=path)
    equals_eager(torch._inductor.aoti_load_package(path), module)


def onnx_session(module: nn.Module, example: tuple[Tensor, ...], **options: Any) -> Any:
    """A function of tensors: the model as onnxruntime runs it."""
    import onnxruntime

    program = torch.onnx.export(module, example, dynamo=True, verbose=False, **options)
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def call(*arguments: Tensor) -> list[Tensor]:
        given = zip(names, (x.numpy() for x in arguments), strict=True)
        return list(map(torch.from_numpy, session.run(None, dict(given))))

    return call


@torch.no_grad()
def onnx(new: Callable[[], nn.Module], masked: bool = False) -> None:
    module = new().eval()
    example = inputs(module, B, T, masked)
    call = onnx_session(module, example, dynamic_shapes=(OPEN,) * len(example))
    for batch, length in SIZES:
        arguments = inputs(module, batch, length, masked)
        outputs = torch.utils._pytree.tree_leaves(module(*arguments))
        same(tuple(call(*arguments)), tuple(x for x in outputs if x is not None))


@torch.no_grad()
def onnx_static_cache() -> None:
    step = Step(llama("query_norm", mlp=True))
    ids, cache = torch.randint(0, 31, (1, 5)), step.empty()
    call = onnx_session(step, (ids[:, :1], torch.tensor([0]), *cache))
    want = step.model(ids, use_cache=False).logits
    for i in range(ids.shape[1]):
        logits, *cache = call(ids[:, i : i + 1], torch.tensor([i]), *cache)
        assert_close(logits, want[:, i : i + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def exporter(kind: str) -> None:
    """transformers' own exporters."""
    from transformers import exporters

    options = getattr(exporters, f"{kind}Config")(dynamic=True)
    model = llama(mlp=True)
    names = ("input_ids", "attention_mask")
    given = dict(zip(names, tokens(2, 7), strict=True))
    program = getattr(exporters, f"{kind}Exporter")().export(model, given, options)
    ids, mask = tokens(3, 11)
    got, want = (call(input_ids=ids, attention_mask=mask).logits for call in (program, model))
    assert_close(got[mask == 1], want[mask == 1], rtol=1e-5, atol=1e-5)


def page(kind: str, directory: str) -> None:
    """docs/export.md: its blocks in one namespace, those of ONNX or of AOTInductor where asked."""
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    os.chdir(directory)
    names: dict[str, Any] = {}
    for block in blocks:
        if not any(word in block and word != kind for word in ("onnx", "aoti")):
            exec(block, names)


def in_a_directory(case: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        case(directory)


MASKED = ("two_stage", "query_norm", "mh_moe")
STRICT = ("two_stage", "query_norm", "mh_moe", "packed experts")
IN_ONNX = ("one_stage", "query_norm", "groups", "sparsemax", "mh_moe, cosine", "ternary heads")
ROUTERS = ("two_stage", "one_stage", "query_norm", "fitted")
EVEN_CASES = {name: partial(layer, new) for name, new in EVEN.items()}
CASES: dict[str, Callable[[], None]] = {
    **{name: partial(layer, new) for name, new in LAYERS.items()},
    **{f"{name}, mask": partial(layer, LAYERS[name], masked=True) for name in MASKED},
    **{f"{name}, strict": partial(layer, LAYERS[name], strict=True) for name in STRICT},
    **{f"{name}, learns": partial(learns, name) for name in ("two_stage", "query_norm", "mh_moe")},
    "named": named,
    "documents": documents,
    "aggregated": aggregated,
    **{f"llama, {router}": partial(layer, lambda r=router: Logits(llama(r))) for router in ROUTERS},
    "llama, mlp": partial(layer, lambda: Logits(llama(mlp=True))),
    "page": partial(in_a_directory, partial(page, "plain")),
    "static cache, two_stage": partial(static_cache, "two_stage", strict=False),
    "static cache, query_norm, strict": partial(static_cache, "query_norm", strict=True),
}
PACKAGES: dict[str, Callable[[], None]] = {
    "layers": partial(in_a_directory, partial(packaged, Both)),
    "llama": partial(in_a_directory, partial(packaged, lambda: Logits(llama(mlp=True)))),
    "page, aoti": partial(in_a_directory, partial(page, "aoti")),
}
ONNX: dict[str, Callable[[], None]] = {
    **{f"{name}, onnx": partial(onnx, LAYERS[name]) for name in IN_ONNX},
    "two_stage, mask, onnx": partial(onnx, LAYERS["two_stage"], masked=True),
    "mh_moe, mask, onnx": partial(onnx, LAYERS["mh_moe"], masked=True),
    "llama, onnx": partial(onnx, lambda: Logits(llama())),
    "llama, mlp, onnx": partial(onnx, lambda: Logits(llama("fitted", mlp=True))),
    "static cache, onnx": onnx_static_cache,
    "page, onnx": partial(in_a_directory, partial(page, "onnx")),
}
EXPORTERS = {kind: partial(exporter, kind) for kind in ("Dynamo", "Onnx")}


def outcome(case: str) -> str:
    torch.manual_seed(0)
    torch.compiler.reset()
    try:
        # torch's and transformers' exporters print what they do.
        with contextlib.redirect_stdout(sys.stderr):
            (EVEN_CASES | CASES | PACKAGES | ONNX | EXPORTERS)[case]()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(json.dumps({case: outcome(case) for case in sys.argv[1:]}))
