"""What reading must compute and read, beside what models have."""

from dataclasses import replace

import pytest
import torch

from headwise.bench import model
from headwise.bench.comparison import Effort, LeftOutError
from headwise.bench.machine import Machine
from headwise.bench.model import GROUPED, PLAIN, WHOLE_GROUPS, Kind, Reading
from headwise.parity import count_flops
from headwise.training.speed import filled_cache

EFFORT = Effort(torch.device("cpu"), rounds=1, seconds=0.0, warmups=0, quick=False, toy=True)
SLOW = Machine(1e3, dict.fromkeys(model.DTYPES, 1e3), memory=1e12)


def dense_of(reading):
    return model._models(EFFORT, reading)[0]


@pytest.mark.parametrize("kind", [PLAIN, GROUPED])
@pytest.mark.parametrize("dtype", model.DTYPES)
def test_a_dense_model_computes_and_reads_all_of_itself(kind, dtype):
    prompt = Reading("prompt", kind, dtype, 67, batch=3)
    dense = dense_of(prompt)
    flops = count_flops(dense, sequence_length=67)
    head = flops.pop("lm_head")
    assert prompt.work().flops == pytest.approx(3 * (67 * sum(flops.values()) + head))
    weights = [p.nbytes for n, p in dense.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert prompt.work().read == sum(weights)
    token = replace(prompt, what="next token")
    cache = filled_cache(dense, 67, 3)
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert token.work().read == sum(weights) + held
    assert token.work(bits=4).read == sum(weights) + held * 4 // (8 * dtype.itemsize)


def test_heads_that_are_off_are_neither_computed_nor_read():
    token = Reading("next token", GROUPED, torch.float32, 67, batch=3)
    dense, half = token.work(), token.work(0.5, 3.0)
    # 2 layers, 3 texts: half of 2·D² of outputs and of 4·D of each of 68 keys.
    assert dense.flops - half.flops == 2 * 3 * (1024**2 + 2 * 1024 * 68)
    # 2 layers, keys and values, 3 texts, 67 tokens, 1 of 4 key heads of 64 channels, 4 bytes.
    assert dense.read - half.read == 2 * 2 * 3 * 67 * 64 * 4


def test_a_key_head_is_read_if_any_of_its_heads_is_on():
    gates = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.5, 0.0, 0.0, 2.0]]])
    assert model._key_heads_on([gates, gates], 2) == 1.5
    assert model._key_heads_on([gates], 4) == 1.5
    assert model._key_heads_on([gates], 1) == 1.0


def test_what_takes_too_long_or_does_not_fit_is_left_out_by_name():
    prompt = Reading("prompt", PLAIN, torch.float32, 1024, batch=8)
    with pytest.raises(LeftOutError, match=r"^prompt, B=8, T=1024, Llama.* float32: it would take"):
        model.compare(EFFORT, SLOW, prompt)
    token = replace(prompt, what="next token")
    with pytest.raises(LeftOutError, match=r"^next token, B=8, S=1024, .* its cache takes"):
        model.compare(EFFORT, replace(SLOW, memory=1e6), token)


def test_a_cache_that_cannot_be_made_is_left_out(monkeypatch):
    def refuse(backend, config):
        raise ImportError(f"You need to install {backend}")

    monkeypatch.setattr(model, "QuantizedCache", refuse)
    token = Reading("next token", WHOLE_GROUPS, torch.float32, 67, quantised="hqq")
    with pytest.raises(LeftOutError, match="hqq cache, whole key groups: You need to install hqq"):
        model.compare(EFFORT, SLOW, token)


def test_a_quantised_cache_keeps_its_length():
    kind = Kind(96, 6, 3, shared=2, active=4)
    reading = Reading("next token", kind, torch.float32, 67, quantised="fp8")
    dense = dense_of(reading)
    try:
        read = model._reader(reading, dense)
    except LeftOutError as reason:
        pytest.skip(str(reason))
    (cache,) = (x.cell_contents for x in read.__closure__ if hasattr(x.cell_contents, "layers"))
    for _ in range(2):
        read(dense, torch.tensor([[7]]))
    assert cache.get_seq_length() == 67


def test_all_batches_and_lengths_are_asked_for():
    full = replace(EFFORT, toy=False)
    asked = list(model._readings(full, torch.float32))
    assert len({(x.case, str(x), x.kind.active) for x in asked}) == len(asked)
    for what in ("prompt", "next token"):
        sizes = {(x.batch, x.length) for x in asked if (x.what, x.kind) == (what, GROUPED)}
        assert {b for b, _ in sizes} == {1, 8, 32}
        assert {n for _, n in sizes} >= {1024, 65536}
    quick = list(model._readings(replace(full, quick=True), torch.float32))
    assert len(quick) < 10
    assert not any(x.quantised for x in quick)
