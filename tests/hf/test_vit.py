"""transformers' ViT converted: trained to tell colours, saved, loaded, asked by a pipeline."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from headwise import MHMoEConfig, MoHConfig, convert, record_routing
from headwise.parity import count_flops, measure_flops

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 30, 240)}
SIDE, PATCH, HEADS, LAYERS = 10, 2, 5, 2
TOKENS = 1 + (SIDE // PATCH) ** 2
LEARNED = MoHConfig(shared=2, active=3, router="two_stage", router_std=0.02)
EXPERTS = MHMoEConfig(num_heads=2, num_experts=3, top_k=2, expert_dim=7)
CONVERSIONS = {
    "query_norm": {"attention": MoHConfig(router="query_norm", shared=1, active=3)},
    "two_stage": {"attention": LEARNED},
    "both": {"attention": LEARNED, "mlp": EXPERTS},
}


def tiny() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=20, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=23,
        image_size=SIDE, patch_size=PATCH, id2label=dict(enumerate(COLOURS)), layer_norm_eps=1e-6,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def pictures(per_colour: int) -> list[Image.Image]:
    """Squares of each colour in turn, with noise."""
    generator = torch.Generator().manual_seed(per_colour)
    noise = torch.randint(-30, 31, (per_colour, 3, SIDE, SIDE, 3), generator=generator)
    squares = torch.tensor(list(COLOURS.values()))[:, None, None] + noise
    return [Image.fromarray(x.numpy()) for x in squares.clamp(0, 255).byte().flatten(0, 1)]


@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_it_learns_is_saved_and_classifies(conversion, tmp_path):
    model = convert(tiny(), **conversion).train()
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels = processor(pictures(7), return_tensors="pt")["pixel_values"]
    labels = torch.arange(3).repeat(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_close(again(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    classify = pipeline("image-classification", model=str(tmp_path), top_k=1, device="cpu")
    with record_routing(classify.model) as routings:
        found = [answer["label"] for (answer,) in classify(pictures(5))]
    assert found == [*COLOURS] * 5
    heads = [r for name, r in routings.items() if "attention" in name]
    assert [(r.weights != 0).sum(-1).unique().tolist() for r in heads] == [[3]] * LAYERS


def test_flops_equal_torchs_counter_less_the_heads_that_are_off():
    model = convert(tiny(), **CONVERSIONS["query_norm"])
    with torch.no_grad():
        seen = measure_flops(lambda: model(torch.randn(1, 3, SIDE, SIDE)))
    by_formula = sum(count_flops(model, sequence_length=TOKENS).values()) * TOKENS
    off = LAYERS * 2 * 4 * 4 * TOKENS**2
    patches = 2 * 3 * PATCH**2 * 20  # counted for the class token too, which needs none
    assert by_formula == pytest.approx(seen - off + patches, rel=1e-6)
