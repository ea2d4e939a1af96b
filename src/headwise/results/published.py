"""Figures that the papers published, for beside ours. None of them was measured here."""

from typing import NamedTuple


class Published(NamedTuple):
    """A paper's figures for the variants of a study.

    Attributes:
        source: Paper and place.
        what: What the figures are.
        columns: Their names.
        rows: One figure a column, by the variant's name, as printed.
    """

    source: str
    what: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    def of(self, variant: str) -> tuple[str, ...]:
        """The figures of a variant; dashes where the paper has none."""
        return self.rows.get(variant, ("–",) * len(self.columns))


_MH_MOE, _FIRST, _MOH = "arXiv 2411.16205", "arXiv 2404.15045", "arXiv 2410.11842"
_TEXTS = ("RedPajama", "Wiki", "C4")
_TEXTS_WHAT = "perplexity, 12 layers of width 768, 100k steps of 0.5M tokens"

PUBLISHED = {
    "mhmoe-main": Published(_MH_MOE, _TEXTS_WHAT, _TEXTS, {
        "dense": ("12.13", "11.58", "16.21"),
        "moe": ("10.90", "9.68", "14.35"),
        "fine": ("10.74", "9.38", "13.97"),
        "mh_moe_2": ("10.70", "9.26", "13.80"),
        "mh_moe_3": ("10.51", "9.18", "13.63"),
    }),
    "mhmoe-shared-expert": Published(_MH_MOE, _TEXTS_WHAT, _TEXTS, {
        "moe": ("10.66", "9.44", "14.30"),
        "fine": ("10.41", "9.15", "13.78"),
        "mh_moe_2": ("10.36", "8.79", "13.66"),
        "mh_moe_3": ("10.28", "8.72", "13.49"),
    }),
    "mhmoe-bitnet": Published(_MH_MOE, _TEXTS_WHAT, _TEXTS, {
        "dense": ("30.04", "24.75", "33.55"),
        "moe": ("26.78", "21.54", "29.73"),
        "fine": ("26.68", "21.42", "29.50"),
        "mh_moe_2": ("26.59", "21.11", "29.27"),
        "mh_moe_3": ("26.47", "21.06", "29.14"),
    }),
    "mhmoe-layers": Published(_MH_MOE, "perplexity at 50k steps", ("RedPajama",), {
        "neither": ("11.97",),
        "head": ("11.74",),
        "merge": ("11.84",),
        "both": ("11.60",),
        "moe": ("11.87",),
        "moe_both": ("11.84",),
        "fine": ("11.68",),
        "fine_both": ("11.67",),
    }),
    "mhmoe-heads": Published(
        _FIRST,
        "English perplexity of the first version, 8 experts, FLOPs not matched (about fourfold)",
        ("perplexity",),
        {"h2": ("12.87",), "h4": ("12.72",), "h6": ("12.41",), "h8": ("12.95",), "h12": ("13.28",)},
    ),
    "moh-components": Published(
        _MOH, "75 % of the heads on: accuracy of ViT-S at 100 epochs, FID of DiT-S",
        ("ViT-S top-1 ↑", "DiT-S FID ↓"),
        {"routed": ("75.6", "71.97"), "shared": ("78.3", "69.54"), "two_stage": ("78.6", "69.42")},
    ),
    "moh-shared-share": Published(
        _MOH,
        "accuracy of ViT-S at 100 epochs; from 14 to 74 % shared it lies between 78.4 and 78.6",
        (), {},
    ),
    "moh-budget": Published(
        _MOH, "mean accuracy of MoH-LLM-S on six tasks after 100B tokens",
        ("LLM-S ↑",),
        {"dense": ("43.9",), "moh_75": ("44.6",), "moh_50": ("45.4",)},
    ),
    "vit-budget": Published(
        _MOH,
        "top-1 accuracy on ImageNet-1K after 300 epochs; its MoH-ViT-S has 80 % on, too: 84.7",
        ("ViT-S ↑", "ViT-B ↑"),
        {"dense": ("84.7", "84.8"), "moh_75": ("84.6", "84.9"), "moh_50": ("–", "84.7")},
    ),
    "dit-budget": Published(
        _MOH, "FID on ImageNet 256 × 256 after 400k steps, without guidance",
        ("DiT-S/2 ↓", "DiT-B/2 ↓", "DiT-L/2 ↓"),
        {
            "dense": ("68.40", "43.47", "23.33"),
            "moh_90": ("67.25", "43.40", "23.17"),
            "moh_75": ("69.42", "43.61", "24.29"),
        },
    ),
}  # fmt: skip
