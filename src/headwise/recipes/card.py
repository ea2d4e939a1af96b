"""The model card of a converted model: README.md, ready for the Hugging Face hub."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from headwise.hf.auto import auto_class_of

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(
    model: Any, path: str, name: str, budgets: Sequence[str], perplexities: Mapping[str, float]
) -> str:
    """What was done, how to load it, and what it cost where that was measured.

    Args:
        model: With routed heads.
        path: Of the original, a directory or a name on the hub.
        name: Of the converted model.
        budgets: A line for each layer, or one for all.
        perplexities: On text kept from calibration, by which heads are on; may be empty.
    """
    auto = auto_class_of(model).__name__
    data = ModelCardData(
        library_name="transformers",
        base_model=_hub_name(path),
        pipeline_tag=_PIPELINES.get(auto),
        tags=["headwise", "mixture-of-head-attention"],
    )
    router = model.conversion.attention.router
    listed = "\n".join(f"- {line}" for line in budgets)
    return f"""---
{data.to_yaml()}
---
# {Path(path).name} with routed heads

{Path(path).name}, converted by headwise: Mixture-of-Head attention (arXiv 2410.11842), router
`{router}`. The weights are those of the original; they were not tuned since.

{listed}

```bash
pip install headwise
```

```python
from transformers import {auto}

import headwise

model = {auto}.from_pretrained("{name}")
```
{_compared(perplexities)}"""


def _hub_name(path: str) -> str | None:
    """Of the original: the path, or what the config in the directory says that it came from."""
    directory = Path(path)
    if not directory.is_dir():
        return path
    name = json.loads((directory / "config.json").read_text()).get("_name_or_path", "")
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None


def _compared(perplexities: Mapping[str, float]) -> str:
    if not perplexities:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in perplexities.items())
    return f"""
On the last quarter of the text by which the shared heads were chosen, which had no part in that:

| heads | perplexity |
|---|---:|
{rows}
"""
