"""Documents in a row and padded batches: each token as if its document were alone."""

from dataclasses import replace

import pytest
import torch
from conversions import ALL_ON, QUERY_NORM, TWO_STAGE
from test_families import GENERATING
from test_families import tiny as tiny_of
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, StaticCache

from headwise import convert
from headwise.hf.attention import attend

LENGTHS = (7, 1, 13)
# As many tokens as the kernels in C++ are asked for.
MANY = (53, 1, 61, 17)
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


def in_a_row(documents):
    """Their tokens, and positions that start again."""
    positions = [torch.arange(len(document)) for document in documents]
    return torch.cat(documents)[None], torch.cat(positions)[None]


# Mistral has a sliding window that is shorter than the documents.
@pytest.mark.parametrize("family", GENERATING)
def test_positions_that_start_again_keep_documents_apart(family, kernels_built):
    model = convert(tiny_of(family), attention=TWO_STAGE)
    documents = [torch.randint(3, 31, (length,)) for length in MANY]
    expected = alone(model, documents)
    ids, positions = in_a_row(documents)
    for cache in (
        {},
        {"use_cache": False},
        {"past_key_values": StaticCache(config=model.config, max_cache_len=149)},
    ):
        with torch.no_grad():
            logits = model(ids, position_ids=positions, **cache).logits[0]
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [[1], "all"])
@pytest.mark.parametrize("heads", [TWO_STAGE, ALL_ON], ids=["some on", "all on"])
def test_layers_that_compute_every_head_keep_documents_apart(layers, heads, documents):
    layers = {} if layers == "all" else {"layers": layers}
    model = convert(tiny_of("Mistral"), attention=heads, **layers)
    ids, positions = in_a_row(documents)
    edges = torch.tensor([0, 7, 8, 21], dtype=torch.int32)
    for given in ({}, {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}):
        with torch.no_grad():
            logits = model(ids, position_ids=positions, **given).logits[0]
        assert_close(logits, alone(model, documents))


@pytest.mark.parametrize("heads", [TWO_STAGE, ALL_ON], ids=["some on", "all on"])
def test_documents_that_end_too_early_are_refused(heads, documents, tiny):
    model = convert(tiny(), attention=heads)
    ids, _ = in_a_row(documents)
    edges = torch.tensor([0, 7, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"is \[0, 7, 20\]; it must ascend from 0 to .*T = 21"):
        model(ids, cu_seq_lens_q=edges, cu_seq_lens_k=edges)


def test_documents_in_several_rows(model):
    rows = [[torch.randint(3, 31, (n,)) for n in lengths] for lengths in ((5, 6), (1, 7, 3))]
    ids, positions = map(torch.cat, zip(*map(in_a_row, rows), strict=True))
    with torch.no_grad():
        for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            logits = model(position_ids=positions, **given).logits
            assert_close(logits, torch.stack([alone(model, row) for row in rows]))


def test_the_gradients_are_those_of_documents_alone(documents):
    heads = replace(TWO_STAGE, balance_coefficient=0)
    model = convert(tiny_of("Mistral"), attention=heads).double().train()
    ids, positions = in_a_row(documents)
    gradients = []
    for given in ([(ids, positions)], [(document[None], None) for document in documents]):
        model.zero_grad()
        for tokens, of_tokens in given:
            model(tokens, position_ids=of_tokens).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_close(*gradients)


def test_what_only_looks_like_documents_is_one(model):
    """Positions that jump without a 0, and those that go on from what is cached."""
    ids = torch.randint(3, 31, (1, 11))
    jumping = torch.tensor([[0, 1, 2, 3, 7, 8, 9, 5, 6, 7, 8]])
    expected = model(ids, position_ids=jumping, attention_mask=torch.ones_like(ids)).logits
    assert_close(model(ids, position_ids=jumping).logits, expected)
    first = model(ids[:, :4], use_cache=True)
    rest = model(
        ids[:, 4:], position_ids=torch.arange(7)[None], past_key_values=first.past_key_values
    ).logits
    assert (rest[:, -1] - model(ids[:, 4:]).logits[:, -1]).abs().max() > 1e-3


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
