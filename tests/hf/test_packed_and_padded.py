"""Documents in a row and padded batches: each token as if its document were alone."""

import pytest
import torch
from conversions import QUERY_NORM, TWO_STAGE
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening

from headwise import convert
from headwise.hf.attention import attend

LENGTHS = (7, 1, 13)
ROUTERS = {"query_norm": QUERY_NORM, "two_stage": TWO_STAGE}


@pytest.fixture(params=ROUTERS.values(), ids=ROUTERS)
def model(request, tiny):
    return convert(tiny(), attention=request.param).eval()


@pytest.fixture
def documents():
    return [torch.randint(3, 31, (length,)) for length in LENGTHS]


def alone(model, documents):
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in documents])


@pytest.mark.parametrize("kwargs", [False, True], ids=["positions", "cu_seq_lens"])
def test_a_flattened_batch(model, documents, kwargs):
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=kwargs)
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    batch.pop("labels")
    assert ("cu_seq_lens_q" in batch) is kwargs
    with torch.no_grad():
        assert_close(model(**batch, use_cache=False).logits[0], alone(model, documents))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(model, documents, side):
    width = max(LENGTHS)
    ids, real = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(3, width).long()
    for row, document in enumerate(documents):
        own = slice(width - len(document), None) if side == "left" else slice(len(document))
        ids[row, own], real[row, own] = document, 1
    positions = (real.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(ids, attention_mask=real, position_ids=positions).logits
    assert_close(logits[real == 1], alone(model, documents))


class Module(torch.nn.Module):
    """A transformers attention, as far as the attention function looks."""

    is_causal = True

    def __init__(self, model):
        super().__init__()
        self.router = model.model.layers[0].self_attn.router


@pytest.fixture
def operands(tiny):
    model = convert(tiny(), attention=TWO_STAGE)
    heads = model.config.num_attention_heads
    q, k, v = torch.randn(3, 2, heads, 11, 8)
    routing = model.model.layers[0].self_attn.router(torch.randn(2, 11, model.config.hidden_size))
    return Module(model), q, k, v, routing


def test_documents_are_kept_apart_where_transformers_makes_no_mask(operands):
    module, *heads, routing = operands
    heads = [x[:1] for x in heads]
    routing = routing._replace(weights=routing.weights[:1])
    edges = torch.tensor([0, 4, 11], dtype=torch.int32)
    y, _ = attend(module, *heads, None, routing=routing, cu_seq_lens_q=edges, cu_seq_lens_k=edges)
    for own in (slice(0, 4), slice(4, 11)):
        part = routing._replace(weights=routing.weights[:, own])
        expected, _ = attend(module, *(x[:, :, own] for x in heads), None, routing=part)
        assert_close(y[:, own], expected)


def test_in_training_padding_has_no_head_on(operands):
    module, q, k, v, routing = operands
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, :3] = real[1, 9:] = False
    mask = real[:, None, None] & torch.ones(11, 11, dtype=torch.bool).tril()
    with torch.no_grad():
        y, _ = attend(module, q, k, v, mask, routing=routing)
    assert (y[1, 9:] != 0).any(-1).any(-1).all()
    y, _ = attend(module, q, k, v, mask, routing=routing)
    assert (y[~real] == 0).all()
    assert (y[real] != 0).any(-1).any(-1).all()
    k[~real[:, None].expand(k.shape[:3])] = 1e3
    again, _ = attend(module, q, k, v, mask, routing=routing)
    assert_close(again[real], y[real])
