"""docs/sharding.md: its code runs, that for two processes in two."""

import os
import re
from pathlib import Path

import pytest
import torch

import headwise
from processes import run_in
from tiny import llama

PAGE = (Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OF_TWO = [block for block in BLOCKS if "torchrun --nproc-per-node 2" in block]
SIZES = {"num_key_value_heads": 2, "eos_token_id": None}


def run_blocks(_, place):
    os.chdir(place)
    os.environ["WORLD_SIZE"] = "2"  # as torchrun says
    texts = []
    for block in OF_TWO:
        exec(block, names := {})
        texts.append(names.get("text"))
    whole = headwise.load("moh")
    expected = whole.generate(torch.arange(3, 10)[None], max_new_tokens=5, do_sample=False)
    assert torch.equal(texts[0], expected)
    again = headwise.load("gathered").state_dict()
    assert all(torch.equal(again[name], x) for name, x in whole.state_dict().items())


def test_code_for_two_processes_runs(tmp_path):
    pytest.importorskip("transformers.distributed.mixin", reason="transformers splits otherwise")
    heads = headwise.MoHConfig(active=4, router="two_stage", router_std=0.02)
    headwise.convert(llama(**SIZES), attention=heads).save_pretrained(tmp_path / "moh")
    experts = headwise.MoEConfig(num_experts=6, top_k=2, expert_dim=11)
    headwise.convert(llama(**SIZES), mlp=experts).save_pretrained(tmp_path / "moe")
    assert len(OF_TWO) == 3
    run_in(2, f"file://{tmp_path / 'store'}", run_blocks, tmp_path)


def test_other_code_runs(capsys):
    for block in BLOCKS:
        if block not in OF_TWO:
            exec(block, {})
    assert capsys.readouterr().out == "2.8 GiB, 43.7 GiB a step\n"
