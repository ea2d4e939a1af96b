"""transformers' Trainer on a stream: resumed equals never stopped, processes share its blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

# Run as `python -c PROGRAM files output steps`; a process lists the blocks that it was given.
PROGRAM = """
import json, os, sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator
from headwise.data.sources import Source
from headwise.data.streams import BlockStream
from headwise.training.trainer import SafeTrainer

files, output, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
processes = int(os.environ.get("WORLD_SIZE", 1))
seen = []


class Listing(SafeTrainer):
    def training_step(self, model, inputs, *rest):
        seen.append(inputs["input_ids"].tolist())
        if self.state.global_step == kill_at:
            os._exit(9)
        return super().training_step(model, inputs, *rest)


tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(1009)}, unk_token="0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
sources = [
    Source("json", data_files=f"{files}/a*.jsonl", domain="a", weight=2),
    Source("json", data_files=f"{files}/b*.jsonl", domain="b"),
]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=1009, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, attention_dropout=0.1,
))
trainer = Listing(
    model=model,
    args=TrainingArguments(
        output_dir=output, max_steps=3, save_steps=1, per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2, report_to="none", use_cpu=True, seed=0,
        dataloader_pin_memory=False, disable_tqdm=True, ddp_find_unused_parameters=False,
    ),
    train_dataset=BlockStream(sources, tokenizer, sequence_length=7, seed=0, end=0, buffer=5),
    data_collator=default_data_collator,
    title="stream",
    per_step=56,
)
trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
with open(f"{output}/seen{trainer.args.process_index}.json", "w") as file:
    json.dump(seen, file)
"""
TWO_PROCESSES = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
NEVER = -1


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name, first in (("a0", 1), ("a1", 301), ("b0", 601)):
        texts = (" ".join(map(str, range(i, i + 11))) for i in range(first, first + 290, 11))
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def train(files: Path, output: Path, kill_at: int = NEVER, launch: tuple[str, ...] = ()) -> int:
    program = files / "train.py"
    program.write_text(PROGRAM)
    command = [sys.executable, *launch, program, files, output, str(kill_at)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode


def blocks(output: Path, process: int) -> list[list[list[int]]]:
    return json.loads((output / f"seen{process}.json").read_text())


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert train(files, output) == 0
    return output


def test_killed_and_resumed_equals_never_killed(files, tmp_path, whole):
    assert train(files, tmp_path, kill_at=2) == 9
    assert not (tmp_path / "checkpoint-3").exists()
    assert train(files, tmp_path) == 0
    assert blocks(tmp_path, 0) == blocks(whole, 0)[4:]
    weights = [load_file(run / "checkpoint-3" / "model.safetensors") for run in (tmp_path, whole)]
    assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_two_processes_share_the_blocks_of_one(files, tmp_path, whole):
    assert train(files, tmp_path, launch=TWO_PROCESSES) == 0
    shares = zip(blocks(tmp_path, 0), blocks(tmp_path, 1), strict=True)
    assert [first + second for first, second in shares] == blocks(whole, 0)
