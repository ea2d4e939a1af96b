"""What a model writes by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from headwise.commands.write_text import WritingRun, write_text
from tiny import llama


@pytest.fixture
def model(tmp_path) -> Path:
    """Writes each of 5 tokens with the same probability, the end of a text among them."""
    uniform = llama(vocab_size=5, bos_token_id=3, eos_token_id=4)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    uniform.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(path: Path) -> np.ndarray:
    return np.array(Dataset.from_parquet(str(path), keep_in_memory=True)["input_ids"])


def test_samples_follow_the_models_distribution_and_go_on_after_the_end(model, tmp_path):
    write_text(WritingRun(str(model), tmp_path / "a.parquet", count=70, length=60, batch_size=32))
    tokens = rows(tmp_path / "a.parquet")
    assert tokens.shape == (70, 60)
    assert (tokens[:, 0] == 3).all()
    shares = np.bincount(tokens[:, 1:].ravel(), minlength=5) / tokens[:, 1:].size
    assert np.abs(shares - 0.2).max() < 0.03
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_seed_repeats_them(model, tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        path = tmp_path / f"{name}.parquet"
        write_text(WritingRun(str(model), path, count=3, length=20, seed=seed))
    a, b, c = (rows(tmp_path / f"{name}.parquet") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_wrong_input(model, tmp_path):
    (tmp_path / "there.parquet").touch()
    for fields, message in [
        ({"output": tmp_path / "a.txt"}, "must end in .parquet"),
        ({"output": tmp_path / "there.parquet"}, "which exists"),
        ({"output": tmp_path / "a.parquet", "length": 1}, "length is 1; it must be at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            WritingRun(str(model), **fields)
    with pytest.raises(ValueError, match=r"length is 9999; the model in .* takes at most"):
        write_text(WritingRun(str(model), tmp_path / "a.parquet", length=9999))
    with pytest.raises(ValueError, match="holds no model"):
        write_text(WritingRun(str(tmp_path), tmp_path / "a.parquet"))
