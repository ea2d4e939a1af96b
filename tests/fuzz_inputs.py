"""What commands read, whole and broken, tiny: models, texts, images, tables, records."""

from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil

from headwise.analysis.records import Curve, ModelRecord, RunRecord, to_json
from headwise.data.text import END_OF_TEXT, Domain, train_tokenizer
from headwise.hf import MoHConfig, convert
from headwise.models import DiT, DiTConfig, TransNeXtConfig, TransNeXtForImageClassification

SIZES = {
    "vocab_size": 257, "hidden_size": 16, "intermediate_size": 13, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LINES = "".join(f"line {i} a b c\n" for i in range(1000))


def write_inputs(root: Path) -> None:
    """One of each kind into a new directory."""
    root.mkdir(parents=True)
    write_models(root)
    (root / "text.txt").write_text(LINES)
    for name in ("one", "two"):
        (root / "domains" / name).mkdir(parents=True)
        (root / "domains" / name / "a.txt").write_text(LINES)
    for name, content in {
        "empty.txt": b"", "latin.txt": b"\xff\xfe", "nothing.json": b"", "half.json": b'{"a": [',
        "null.json": b"null", "list.mixture.json": b"[3]", "a.mixture.json": b"{}",
        "piqa.json": b"[]", "task.yaml": b"a: [",
        "broken.parquet": b"PAR1", "broken.png": b"\x89PNG",
    }.items():  # fmt: skip
        (root / name).write_bytes(content)
    Dataset.from_dict({"input_ids": [[3] * 16] * 30}).to_parquet(str(root / "tokens.parquet"))
    Dataset.from_dict({"input_ids": [[2**32 + 5]]}).to_parquet(str(root / "large.parquet"))
    (root / "run").mkdir()
    curve = Curve([1], [2.0])
    record = RunRecord("t", {}, [], [], [], [ModelRecord("a", "A", 0, curve, curve)])
    (root / "run" / "record.json").write_text(to_json(record))
    (root / "other").mkdir()
    (root / "other" / "record.json").write_text("{}")


def write_models(root: Path) -> None:
    """A model of each kind, and images of the classifier's two classes."""
    torch.manual_seed(0)
    words = train_tokenizer([Domain("a", {"a": "a b c"}, {})], vocab_size=257)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(root / "dense")
    convert(model, attention=MoHConfig(router="query_norm", router_std=0.0))
    model.save_pretrained(root / "converted")
    for name in ("dense", "converted"):
        tokenizer.save_pretrained(root / name)
    DiT(DiTConfig.preset("dit-test")).save_pretrained(root / "dit")
    vit = TransNeXtForImageClassification(TransNeXtConfig.preset("test", num_labels=2))
    vit.save_pretrained(root / "vit")
    side, channels = vit.config.image_size, vit.config.num_channels
    PvtImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
    ).save_pretrained(root / "vit")
    for label in "01":
        (root / "images" / label).mkdir(parents=True)
        image = Image.new("L" if channels == 1 else "RGB", (side, side))
        image.save(root / "images" / label / "a.png")
