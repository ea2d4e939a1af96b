"""docs/layers.md: its code runs; the decoder learns, and generates with a cache as without."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import headwise

PAGE = (Path(__file__).parents[1] / "docs" / "layers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def decoder(tmp_path, monkeypatch, capsys):
    """All that the page's decoder defines, trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(inspect.getsource(torch.nn.functional)[:20_000])
    names = {}
    for block in BLOCKS[:2]:
        assert len(block.splitlines()) <= 60
        exec(block, names)
    assert capsys.readouterr().out.startswith("b'")
    return names


def test_the_decoder_learns_and_its_cache_changes_nothing(decoder):
    losses, model = decoder["losses"], decoder["model"].eval()
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < 3.5
    ids = start = decoder["text"][None, 100:111]
    for _ in range(29):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(start, 29), ids)
    with headwise.record_routing(model) as routings:
        model.generate(start, 3)
    on = [(routing.weights != 0).sum(-1).unique().tolist() for routing in routings.values()]
    assert on == [[3], [3]]


@pytest.mark.parametrize("block", BLOCKS[2:])
def test_other_code_runs(block):
    exec(block, {})
