"""Converted models and their configs go through pickle, also to a process that has none yet."""

import copy
import io
import multiprocessing
import pickle
from dataclasses import replace

import pytest
import torch
from conversions import MH_MOE, TWO_STAGE, tiny_dit
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from headwise import convert
from tiny import SIZES

IDS = torch.arange(3, 10)[None]


LLAMA = LlamaConfig(**SIZES)
MODELS = {
    "llama": lambda: convert(
        LlamaForCausalLM(LlamaConfig(**SIZES)), attention=TWO_STAGE, mlp=MH_MOE
    ),
    "bert": lambda: convert(BertForMaskedLM(BertConfig(**SIZES)), attention=TWO_STAGE),
    "ternary": lambda: convert(LlamaModel(LLAMA), attention=TWO_STAGE, ternary=True),
    "dit": lambda: convert(tiny_dit(), attention=replace(TWO_STAGE, active=3)),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def output_of(model):
    if "DiT" in type(model).__name__:
        noise = torch.linspace(-1, 1, 128).view(1, 2, 8, 8)
        return model(noise, timestep=torch.tensor([3]), class_labels=torch.tensor([2])).sample
    return model(IDS)[0]


@pytest.mark.parametrize(
    "again_of",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    ],
    ids=["copy", "pickle", "protocol 2"],
)
def test_a_model_comes_back_as_it_was(model, again_of):
    again = again_of(model)
    assert type(again) is type(model)
    assert type(again.config) is type(model.config)
    assert again.conversion == model.conversion
    assert torch.equal(output_of(again), output_of(model))


def test_torch_saves_and_loads_the_whole_model(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(output_of(again), output_of(model))


def answer(pipe):
    """In a process in which no class of a converted model has been made yet."""
    for _ in MODELS:
        model = pickle.loads(pipe.recv_bytes())
        with torch.no_grad():
            output = output_of(model).tolist()
        pipe.send((type(model).__name__, type(model.config).__name__, output))


def test_a_spawned_process_gets_models():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=answer, args=(there,))
    process.start()
    there.close()
    for make in MODELS.values():
        model = make().eval()
        here.send_bytes(pickle.dumps(model))
        name, config, output = here.recv()
        assert (name, config) == (type(model).__name__, type(model.config).__name__)
        torch.testing.assert_close(torch.tensor(output), output_of(model).detach())
    process.join()
