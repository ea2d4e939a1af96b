"""load_released of what is damaged or something else: one error that names the file."""

import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from headwise import load_released

KINDS = {
    "mh_moe": {
        "config": {"dim": 15, "num_heads": 3, "num_experts": 7, "top_k": 2, "expert_dim": 11}
    },
    "moh_dit": {"preset": "moh-dit-test"},
    "moh_transnext": {"preset": "moh-test"},
}


def whole(path):
    (torch.save if path.suffix == ".pt" else save_file)({"a": torch.zeros(100)}, path)
    return path.read_bytes()


DAMAGES = {
    "text": lambda path: path.write_text("hello world, this is text"),
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "halved": lambda path: path.write_bytes(whole(path)[: len(whole(path)) // 2]),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "other tensors": whole,
    "directory": lambda path: path.mkdir(),
    "missing": lambda path: None,
}
OF_TORCH = {
    "list": [1, 2], "number": {"a": 1}, "tensor": torch.zeros(2), "nothing": {},
    "model": {"model": 3}, "keys": {1: torch.zeros(2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage, suffix, kind, tmp_path):
    path = tmp_path / f"weights{suffix}"
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_released(kind, path, **KINDS[kind])


@pytest.mark.parametrize("content", OF_TORCH)
def test_a_checkpoint_of_something_else_is_named(content, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(OF_TORCH[content], path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_released("mh_moe", path, **KINDS["mh_moe"])


@pytest.mark.parametrize("config", [None, "{}", "[1"])
def test_a_damaged_directory_is_named(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_released("moh_llama", tmp_path)


@pytest.mark.parametrize("source", [None, 3, []])
def test_what_is_no_source_is_named(source):
    with pytest.raises(ValueError, match=r"source is a .*; it must be tensors by name, or a path"):
        load_released("mh_moe", source, **KINDS["mh_moe"])
