"""The Triton kernels against the reference: on a GPU, or else in Triton's interpreter.

Blocks are shrunk to 16 rows and keys, so that small cases take every path: several blocks, blocks
that need no check, programs that leave at once.
"""

from functools import partial

import pytest
import torch
from cases import assert_at_most_twice, plain_attention, value_and_gradients, where_on
from cases import leaves as leaves_of
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from triton_device import DEVICE, ON_GPU, RUNNABLE

from headwise.ops import head_attention
from headwise.ops.attention import (
    Operands,
    choose,
    dense,
    reference,
    triton_decode,
    triton_tiles,
)
from headwise.ops.attention import triton as kernels
from headwise.ops.attention.spans import visible_spans
from headwise.ops.plain_attention import mask_of

pytestmark = RUNNABLE
# The interpreter cuts bfloat16 off instead of rounding it.
HALVES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "tiling", lambda *_: kernels.Tiling(16, 16, 4, 1))
    monkeypatch.setattr(triton_decode, "block_of_keys", lambda *_: 16)


def case(T=37, S=37, H=2, kv_heads=2, C=32, on=0.6, mask=None, B=1, **options):
    """Leaf tensors (all gradients wanted) and the options of a call, in float32."""
    q = torch.randn(B, T, H, C, device=DEVICE)
    k, v = (torch.randn(B, S, kv_heads, C, device=DEVICE) for _ in range(2))
    gate = torch.rand(B, T, H, device=DEVICE) + 0.1
    gate[torch.rand(B, T, H, device=DEVICE) > on] = 0
    if mask is not None:
        mask = torch.rand(mask, device=DEVICE) > 0.4
    options = {"causal": False, "mask": mask, "bias": None, "scale": C**-0.5} | options
    leaves = {"q": q, "k": k, "v": v, "gate": gate}
    return {name: x.requires_grad_() for name, x in leaves.items()}, options


def computed(leaves, options, compute=kernels.head_attention):
    return value_and_gradients(compute(Operands(**leaves, **options)), leaves)


def exact(leaves, options, compute):
    """Value and gradients in float64, the options' mask and all."""
    return computed(leaves_of(leaves, torch.float64), options, compute)


def assert_equal_to(compute, leaves, options):
    found = computed(leaves, options)
    assert_close(found, exact(leaves, options, compute), **CLOSE, check_dtype=False)
    off = leaves["gate"] == 0
    assert all((found[name][off] == 0).all() for name in ("y", "q", "gate"))
    return found


CASES = {
    "full": {},
    "causal": {"causal": True, "T": 67, "S": 67},
    "causal, more keys": {"causal": True, "T": 37, "S": 53},
    "causal, fewer keys": {"causal": True, "T": 53, "S": 29},
    "full, more keys": {"T": 5, "S": 41},
    "grouped": {"H": 6, "kv_heads": 2, "causal": True},
    "one head of keys": {"H": 3, "kv_heads": 1, "T": 23, "S": 31},
    "all on": {"on": 1, "causal": True},
    "few on": {"on": 0.1, "causal": True, "T": 61, "S": 61},
    "48 channels": {"C": 48, "causal": True},
    "64 channels": {"C": 64, "T": 19, "S": 23},
    "one token": {"T": 1, "S": 1, "causal": True, "on": 1},
    "mask of keys": {"B": 2, "mask": (2, 1, 1, 37), "T": 29},
    "mask": {"mask": (1, 2, 37, 37), "causal": True},
    "mask of queries, grouped": {"mask": (1, 1, 29, 37), "T": 29, "H": 2, "kv_heads": 1},
    "scale": {"scale": 0.3, "T": 17},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_attention_in_values_and_all_gradients(name):
    leaves, options = case(**CASES[name])
    assert_equal_to(dense.head_attention, leaves, options)


def test_gradients_have_gradients():
    leaves, options = case(T=17, S=17, causal=True, H=4, mask=(1, 1, 17, 17))
    found = []
    for dtype, compute in (
        (torch.float32, kernels.head_attention), (torch.float64, reference.head_attention),
    ):  # fmt: skip
        inputs = leaves_of(leaves, dtype)
        y = compute(Operands(**inputs, **options))
        first = torch.autograd.grad(y.square().sum(), list(inputs.values()), create_graph=True)
        loss = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(loss, list(inputs.values())))
    assert_close(*found, rtol=1e-3, atol=1e-3, check_dtype=False)


SPANS = {
    "window": {"window": 5},
    "window wider than a block": {"window": 40, "T": 67, "S": 67},
    "window of one": {"window": 1},
    "window, fewer keys": {"window": 20, "T": 53, "S": 29},
    "window, more keys": {"window": 9, "T": 19, "S": 60},
    "documents": {"cu_seqlens": [0, 3, 3, 20, 37]},
    "documents and a window": {"cu_seqlens": [0, 40, 61, 67], "window": 18, "T": 67, "S": 67},
    "documents of other keys": {"cu_seqlens": [0, 9, 37], "cu_seqlens_k": [0, 30, 50], "S": 50},
    "documents, grouped": {"cu_seqlens": [0, 16, 32, 37], "H": 4, "kv_heads": 2, "on": 0.3},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SPANS)
def test_spans_equal_masks(name, causal):
    seen = {x: SPANS[name].get(x) for x in ("window", "cu_seqlens", "cu_seqlens_k")}
    leaves, options = case(**{k: v for k, v in SPANS[name].items() if k not in seen})
    edges = {
        x: torch.tensor(seen[x], device=DEVICE) if seen[x] else None
        for x in ("cu_seqlens", "cu_seqlens_k")
    }
    queries, keys = leaves["q"].shape[1], leaves["k"].shape[1]
    spans = visible_spans(
        queries, keys, causal=causal, window=seen["window"], **edges, device=leaves["q"].device
    )
    options["mask"] = mask_of(spans, keys)
    want = exact(leaves, options, dense.head_attention)
    options["mask"] = None
    got = computed(leaves, options, partial(kernels.head_attention, spans=spans))
    assert_close(got, want, **CLOSE, check_dtype=False)


def test_keys_outside_of_all_spans_are_not_read():
    leaves, options = case(T=64, S=64, on=0.8)
    with torch.no_grad():
        leaves["gate"][:, 32:] = 0
        for name in "kv":
            leaves[name][:, 32:] = torch.nan
        leaves["q"][:, 32:] = torch.nan
    spans = visible_spans(
        64, 64, causal=False, window=None, cu_seqlens=torch.tensor([0, 32, 64], device=DEVICE),
        cu_seqlens_k=None, device=leaves["q"].device,
    )  # fmt: skip
    got = computed(leaves, options, partial(kernels.head_attention, spans=spans))
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_reference(causal):
    leaves, options = case(T=7, S=5, H=2, kv_heads=1, causal=causal, mask=(1, 1, 7, 5))
    assert_equal_to(reference.head_attention, leaves, options)


def test_every_head_has_its_own_number_of_tokens():
    leaves, options = case(H=4, kv_heads=2, T=53, S=53, causal=True)
    with torch.no_grad():
        leaves["gate"].zero_()
        leaves["gate"][:, :, 0] = 0.7
        leaves["gate"][:, 52, 1] = 0.3
        leaves["gate"][:, 16:33, 2] = 0.2
    assert_equal_to(dense.head_attention, leaves, options)


def test_keys_and_values_of_a_head_that_nobody_selected_get_no_gradient():
    leaves, options = case(H=4, kv_heads=2)
    with torch.no_grad():
        leaves["gate"][:, :, 2:] = 0
        leaves["k"][:, :, 1] = torch.nan
        leaves["v"][:, :, 1] = torch.nan
    found = computed(leaves, options)
    assert all(x.isfinite().all() for x in found.values())
    assert all((found[name][:, :, 1] == 0).all() for name in "kv")


def test_neither_queries_that_are_off_nor_blocks_of_keys_that_nobody_sees_are_read():
    leaves, options = case(T=53, S=53, kv_heads=1, causal=True)
    with torch.no_grad():
        leaves["gate"][:, 21:] = 0
        leaves["q"][leaves["gate"] == 0] = torch.nan
        leaves["k"][:, 32:] = torch.nan
        leaves["v"][:, 32:] = torch.nan
    found = computed(leaves, options)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["y"][leaves["gate"] != 0] != 0).all()


def test_all_heads_off_gives_zero():
    leaves, options = case(on=-1, causal=True)
    assert all((x == 0).all() for x in computed(leaves, options).values())


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    leaves, options = case(on=1)
    options["mask"] = torch.ones(1, 1, 37, 37, dtype=torch.bool, device=DEVICE)
    options["mask"][:, :, 3] = False
    found = assert_equal_to(reference.head_attention, leaves, options)
    assert all((found[name][:, 3] == 0).all() for name in ("y", "q", "gate"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_operands_and_gates_of_any_dtype(dtype):
    leaves, options = case(T=23, S=29, causal=True)
    gate = leaves["gate"].detach().to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    heads_first = [leaves[n].detach().transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"]
    channels_strided = leaves["v"].detach().transpose(2, 3).contiguous().transpose(2, 3)
    leaves = dict(zip(("q", "k", "v"), (*heads_first[:2], channels_strided), strict=True))
    leaves = {name: x.requires_grad_() for name, x in (leaves | {"gate": gate}).items()}
    assert assert_equal_to(dense.head_attention, leaves, options)["gate"].dtype == dtype


@pytest.mark.parametrize("how", ["odd stride", "odd start", "one batch entry for two"])
def test_keys_that_the_copy_engine_cannot_read_in_place(how):
    leaves, options = case(B=2, T=23, S=29, causal=True)
    k = {
        "odd stride": torch.randn(2, 29, 2, 33, device=DEVICE)[..., :32],
        "odd start": torch.randn(2, 29, 2, 36, device=DEVICE)[..., 1:33],
        "one batch entry for two": torch.randn(1, 29, 2, 32, device=DEVICE).expand(2, -1, -1, -1),
    }[how]
    leaves = {**leaves, "k": k.requires_grad_()}
    assert_equal_to(dense.head_attention, leaves, options)


def test_an_off_token_gives_zero_whatever_the_values_of_others_are():
    leaves, options = case(T=19, S=19, causal=True, on=1)
    with torch.no_grad():
        leaves["gate"][:, 1::2] = 0
        leaves["v"][:, 18] = torch.nan  # the last token sees it, and it shares a tile with others
        y = kernels.head_attention(Operands(**leaves, **options))
    assert (y[:, 1::2] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_at_most_twice_that_of_plain_attention(dtype, causal):
    leaves, options = case(T=61, S=61, on=0.7, causal=causal)
    leaves = leaves_of(leaves, dtype)
    results = (
        computed(leaves, options), plain_attention(leaves, causal),
        exact(leaves, options, dense.head_attention),
    )  # fmt: skip
    assert_at_most_twice(*(where_on(found, leaves["gate"]) for found in results))


@pytest.mark.parametrize("masked", [False, True])
def test_custom_op_contract(masked):
    leaves, options = case(T=17, S=19, mask=(1, 1, 1, 19) if masked else None)
    arguments = (*leaves.values(), True, None, options["mask"], options["scale"])
    torch.library.opcheck(kernels.triton_attention, arguments)
    detached = (*(x.detach()[:, :2] for x in leaves.values()), False, None, None, options["scale"])
    torch.library.opcheck(triton_decode.triton_decode, detached)


def test_compiles_without_a_break():
    leaves, options = case(T=17, S=17)

    def call(x):
        return kernels.triton_attention(x.q, x.k, x.v, x.gate, True, None, x.mask, x.scale)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(computed(leaves, options, compiled), computed(leaves, options, call))


def test_flops_count_the_rows_that_are_on():
    leaves, options = case(T=5, S=5, on=1)
    with torch.no_grad():
        leaves["gate"][:, :3] = 0  # the last two tokens stay: they see 4 and 5 keys
    with FlopCounterMode(display=False) as counter:
        kernels.head_attention(Operands(**leaves, **options | {"causal": True})).sum().backward()
    # Two products forward; backward seven, as both kernels compute the scores again.
    assert counter.get_total_flops() == 2 * 32 * 2 * (4 + 5) * (2 + 7)
    leaves, options = case(T=1, S=11, on=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        leaves["gate"][:, :, 0] = 0
        kernels.decode_attention(Operands(**leaves, **options))
    assert counter.get_total_flops() == 4 * 32 * 11


DECODE = {
    "one query": {"causal": True, "S": 67},
    "grouped": {"causal": True, "S": 67, "H": 6, "kv_heads": 2},
    "three queries": {"T": 3, "causal": True, "S": 53, "H": 4, "kv_heads": 2},
    "more rows than a tile": {"T": 5, "causal": True, "S": 37, "H": 4, "kv_heads": 1},
    "fewer keys than queries": {"T": 5, "causal": True, "S": 3},
    "not causal": {"T": 2, "S": 16},
    "48 channels": {"C": 48, "S": 29},
    "mask of keys": {"B": 2, "S": 37, "mask": (2, 1, 1, 37)},
    "mask": {"T": 3, "S": 37, "mask": (1, 4, 3, 37), "H": 4, "kv_heads": 2, "causal": True},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", DECODE)
def test_decode_equals_the_reference(name, splits, monkeypatch):
    monkeypatch.setattr(triton_decode, "MAX_SPLITS", splits)
    leaves, options = case(**{"T": 1, "H": 5, "kv_heads": 5} | DECODE[name])
    with torch.no_grad():
        y = kernels.decode_attention(Operands(**leaves, **options))
        wide = {name: x.double() for name, x in leaves.items()}
        assert_close(y.double(), reference.head_attention(Operands(**wide, **options)), **CLOSE)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (1, 20), (3, 5), (3, 90)])
def test_decode_reads_no_blocks_of_keys_before_the_window(tokens, window, splits, monkeypatch):
    monkeypatch.setattr(triton_decode, "MAX_SPLITS", splits)
    leaves, options = case(T=tokens, S=67, H=4, kv_heads=2, on=1)
    device = leaves["q"].device
    spans = visible_spans(
        tokens, 67, causal=True, window=window, cu_seqlens=None, cu_seqlens_k=None, device=device
    )
    with torch.no_grad():
        masked = options | {"mask": mask_of(spans, 67)}
        want = dense.head_attention(Operands(**leaves, **masked))
        for name in "kv":
            leaves[name][:, : max(0, 67 - tokens - window + 1) // 16 * 16] = torch.nan
        got = kernels.decode_attention(Operands(**leaves, **options), spans)
        assert_close(got, want, **CLOSE)
        op = partial(head_attention, impl="triton", causal=True, window=window)
        assert_close(op(*leaves.values(), scale=options["scale"]), want, **CLOSE)


def test_decode_does_not_read_keys_of_a_group_that_is_off():
    leaves, options = case(T=2, H=6, kv_heads=3, on=1)
    with torch.no_grad():
        leaves["gate"][:, :, 2:4] = 0
        leaves["gate"][:, 1, 0] = 0
        leaves["k"][:, :, 1] = torch.nan
        leaves["v"][:, :, 1] = torch.nan
        y = kernels.decode_attention(Operands(**leaves, **options))
    assert y.isfinite().all()
    assert (y[leaves["gate"] == 0] == 0).all()
    assert (y[leaves["gate"] != 0] != 0).all()


def test_decode_of_a_query_that_sees_nothing_gives_zero():
    leaves, options = case(T=1, on=1)
    options["mask"] = torch.zeros(1, 1, 1, 37, dtype=torch.bool, device=DEVICE)
    assert (kernels.decode_attention(Operands(**leaves, **options)) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(1, 1, 5, 7)}, r"bias has shape \[1, 1, 5, 7\].*impl='gathered' does"),
        ({"q": torch.zeros(1, 5, 2, 40)}, "40 channels.*multiples of 16 from 32 to 256"),
        ({"q": torch.zeros(1, 5, 2, 16)}, "16 channels"),
        ({"q": torch.zeros(1, 5, 2, 272)}, "272 channels"),
        ({"q": torch.zeros(1, 5, 2, 32).double()}, "dtype torch.float64.*float32, float16"),
    ],
)
def test_errors_name_the_argument(changes, message):
    leaves, options = case(T=5, S=7)
    with pytest.raises(ValueError, match=message):
        choose(Operands(**leaves | options | changes), impl="triton")


def test_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(triton_tiles, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"q is on cpu.*needs a CUDA device"):
        triton_tiles.check_queries(torch.zeros(1, 5, 2, 32))
