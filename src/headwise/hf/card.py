"""The model card of a converted model: README.md, ready for the Hugging Face hub."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from headwise.hf.auto import auto_class_of
from headwise.hf.surgery import attention_modules

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
_HEADING = " with routed heads"


def model_card(model: Any, path: str, name: str, *, weights: str, figures: str = "") -> str:
    """What was done, how to load it, and what it cost where that was measured.

    Args:
        model: With routed heads.
        path: Of the original, a directory or a name on the hub; or of what it was converted to,
            whose card names it.
        name: Of the converted model's directory.
        weights: A sentence on where they come from.
        figures: What was measured, in Markdown; may be empty.
    """
    auto = auto_class_of(model).__name__
    original, base_model = _original(path)
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        pipeline_tag=_PIPELINES.get(auto),
        tags=["headwise", "mixture-of-head-attention"],
    )
    router = model.conversion.attention.router
    listed = "\n".join(f"- {line}" for line in budget_lines(model))
    return f"""---
{data.to_yaml()}
---
# {original}{_HEADING}

{original}, converted by headwise: Mixture-of-Head attention (arXiv 2410.11842), router
`{router}`. {weights}

{listed}

It needs the library headwise (`pip install headwise`).

```python
from transformers import {auto}

import headwise

model = {auto}.from_pretrained("{name}")  # the directory of this card
```
{figures}"""


def budget_lines(model: Any) -> list[str]:
    """The budget of each layer; one line where all are the same but for how many heads are on."""
    modules: list[Any] = list(attention_modules(model).values())
    budgets = {i: m.router.budget for i, m in enumerate(modules) if hasattr(m, "router")}
    if len(budgets) == len(modules):
        if len(set(map(str, budgets.values()))) == 1:
            return [f"all {len(budgets)} layers: {budgets[0]}"]
        alike = {replace(b, active_heads=b.num_heads, rounded=()) for b in budgets.values()}
        if len(alike) == 1:
            active = [budget.active_heads for budget in budgets.values()]
            return [
                f"heads on, of {budgets[0].num_heads}, layer by layer: "
                f"{' '.join(map(str, active))}; {statistics.fmean(active):.3g} on average, "
                f"{budgets[0].shared_heads} of them shared"
            ]
    return [f"layer {layer}: {budget}" for layer, budget in budgets.items()]


def _original(path: str) -> tuple[str, str | None]:
    """The original's name, and its name on the hub: as a card of ours in the path has them."""
    file = Path(path) / "README.md"
    card = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if heading := re.search(f"^# (.+){_HEADING}$", card, re.MULTILINE):
        base_model = re.search(r"^base_model: (\S+)$", card, re.MULTILINE)
        return heading[1], base_model and base_model[1]
    return Path(path).resolve().name, _hub_name(path)


def _hub_name(path: str) -> str | None:
    """Of the original: the path, or what the config in the directory says that it came from."""
    directory = Path(path)
    if not directory.is_dir():
        return path
    name = json.loads((directory / "config.json").read_text()).get("_name_or_path", "")
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) else None
