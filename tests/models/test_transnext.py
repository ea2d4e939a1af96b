"""TransNeXt and MoH-ViT: published sizes, geometry by hand, any image, loss, saving."""

import math

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from gradients import assert_checkpointing_changes_none
from headwise import balance_loss, record_routing
from headwise.models import TransNeXtBackbone, TransNeXtConfig, TransNeXtForImageClassification
from headwise.models.transnext.config import PRESETS
from headwise.models.transnext.layers import Geometry, PositionBias
from headwise.parity import count_flops, count_parameters, measure_flops

CLASSES = 7
# Stages whose heads are all on with learned weights, one of them on, and some of them.
TINY = {
    "image_size": 20, "patch_size": 2, "hidden_sizes": (10, 18, 30), "depths": (1, 2, 1),
    "num_heads": (2, 3, 5), "mlp_ratios": (3, 2, 2.5), "sr_ratios": (3, 2, 1),
    "drop_path_rate": 0.0, "num_labels": CLASSES,
}  # fmt: skip
ROUTED = {"shared_heads": (2, 0, 2), "active_heads": (2, 1, 3)}
ALL_ON = {"shared_heads": TINY["num_heads"], "active_heads": TINY["num_heads"]}
KINDS = {"dense": {}, "moh": ROUTED}
BOTH = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str = "moh", **changes: object) -> TransNeXtForImageClassification:
    torch.manual_seed(0)
    config = TransNeXtConfig(**TINY | KINDS[kind] | changes)
    model = TransNeXtForImageClassification(config).eval()
    # As they are, tiny models say almost the same of every image.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "conv" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def images(height: int = 20, width: int = 20, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


# Parameters and multiply-adds of a 224 × 224 image in TransNeXt's paper (table 1) and MoH's.
PUBLISHED = {
    "transnext-micro": (12.8, 2.7),
    "transnext-tiny": (28.2, 5.7),
    "transnext-small": (49.7, 10.3),
    "transnext-base": (89.7, 18.4),
    "moh-vit-s-75": (50, None),
    "moh-vit-s-80": (50, None),
    "moh-vit-b-50": (90, None),
    "moh-vit-b-75": (90, None),
}


def on_meta(name: str) -> TransNeXtForImageClassification:
    with torch.device("meta"):
        return TransNeXtForImageClassification(TransNeXtConfig.preset(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_cost_what_is_published(name):
    model = on_meta(name)
    millions, billions = PUBLISHED[name]
    assert count_parameters(model)[0] / 1e6 == pytest.approx(millions, abs=0.1)
    flops = sum(count_flops(model, image_size=224).values())
    if billions is not None:
        assert flops / 2e9 == pytest.approx(billions, rel=0.02)
    else:
        dense = on_meta({"s": "transnext-small", "b": "transnext-base"}[name[8]])
        assert flops < sum(count_flops(dense, image_size=224).values())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_switch_on_the_share_in_their_names(name):
    config = TransNeXtConfig.preset(name)
    budgets = [config.budget(i) for i in range(config.num_stages)]
    if "moh" not in name:
        assert budgets == [None] * config.num_stages
        return
    active = sum(b.active_heads * d for b, d in zip(budgets, config.depths, strict=True))
    heads = sum(b.num_heads * d for b, d in zip(budgets, config.depths, strict=True))
    share = 75 if name == "moh-test" else int(name[-2:])
    assert 100 * active / heads == pytest.approx(share, abs=3.5)


def test_small_presets_are_small():
    for name in ("test", "moh-test"):
        assert count_parameters(on_meta(name))[0] < 1e6


def test_each_position_has_its_own_bias():
    """A map of 5 × 4 with keys pooled by 2, trained on maps of 9: distances times 8 / 8."""
    config = TransNeXtConfig(**TINY | {"image_size": 18 * 2, "sr_ratios": (3, 2, 1)})
    assert config.pretrained_side(1) == 9
    bias = PositionBias(3).double()
    torch.nn.init.normal_(bias.up.bias)
    geometry = Geometry.of(torch.zeros(1, dtype=torch.float64), config, 1, (5, 4))
    assert geometry.pooled == (2, 2)
    got = bias(geometry)
    assert got.shape == (3, 5 * 4, 2 * 2)
    # The windows of adaptive pooling are rows 0, 1, 2 and 2, 3, 4; columns 0, 1 and 2, 3.
    for t, (y, x) in enumerate((y, x) for y in range(5) for x in range(4)):
        for p, (row, column) in enumerate((r, c) for r in (1.0, 3.0) for c in (0.5, 2.5)):
            place = torch.tensor(
                [math.copysign(math.log(abs(d) + 1, 8), d) for d in (y - row, x - column)],
                dtype=torch.float64,
            )
            assert_close(got[:, t, p], bias.down(bias.up(place).relu()))


def test_queries_know_how_many_keys_they_see():
    config = TransNeXtConfig(**TINY)
    near = Geometry.of(torch.zeros(1), config, 0, (3, 4)).log_keys
    # Corners see 2 · 2 of the window, and one pooled key; the middle 3 · 3.
    want = [4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4]
    assert_close(near.exp(), torch.tensor([x + 1.0 for x in want]))
    everywhere = Geometry.of(torch.zeros(1), config, 2, (3, 4)).log_keys
    assert_close(everywhere.exp(), torch.full((12,), 12.0))


def test_weights_start_as_the_paper_says():
    model = TransNeXtForImageClassification(
        TransNeXtConfig(**TINY | ROUTED | {"depths": (1, 3, 1)})
    )
    attention = model.backbone.stages[0].blocks[0].attention
    assert_close(attention.temperature.exp().log1p(), torch.full((2,), 1 / 0.24))
    assert not attention.learned_bias.any()
    assert 0 < attention.local_bias.std() < 0.001
    router = model.backbone.stages[1].blocks[0].attention.router
    assert router.routed.weight.std().item() == pytest.approx(0.02, rel=0.4)


def test_branches_are_left_out_more_and_more_often():
    model = tiny(drop_path_rate=0.3)
    rates = [b.drop_path.drop_prob for s in model.backbone.stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@BOTH
@pytest.mark.parametrize("size", [(20, 20), (31, 13), (9, 44)])
def test_images_of_any_size(kind, size):
    model = tiny(kind)
    output = model(images(*size), output_hidden_states=True)
    assert output.logits.shape == (3, CLASSES)
    want = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (2, 4, 8)]
    assert [tuple(m.shape[2:]) for m in output.hidden_states] == want
    assert_close(output.logits, model.classifier(output.hidden_states[-1].mean((2, 3))))


@BOTH
def test_outputs_do_not_depend_on_batch_mates(kind):
    model, x = tiny(kind).double(), images(23, 17).double()
    together = model(x).logits
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert_close(together, torch.cat([model(image[None]).logits for image in x]))


def test_even_gates_are_a_dense_model():
    routed, dense = tiny(**ALL_ON), tiny("dense")
    weights = routed.state_dict()
    routers = {name for name in weights if ".router." in name}
    assert len(routers) == 4
    for name in routers:
        weights[name].zero_()
    dense.load_state_dict({n: w for n, w in weights.items() if n not in routers})
    assert_close(routed(images()).logits, dense(images()).logits)


def test_tokens_switch_on_their_budget():
    model = tiny()
    with record_routing(model) as routings:
        model(images())
    on = [(r.weights != 0).sum(-1).unique().tolist() for r in routings.values()]
    assert on == [[2], [1], [1], [3]]
    # All heads of the first stage are on, and yet their weights differ.
    first = next(iter(routings.values())).weights
    assert first.std() > 0.1
    assert_close(first.sum(-1), torch.full_like(first[..., 0], 2))


@BOTH
def test_balance_losses_of_layers_that_route_join_in_training(kind):
    model, labels = tiny(kind, balance_coefficient=0.3), torch.tensor([0, 6, 3])
    plain = model(images(), labels=labels).loss
    assert_close(plain, -model(images()).logits.log_softmax(-1)[range(3), labels].mean())
    with record_routing(model) as routings:
        loss = model.train()(images(), labels=labels).loss
    # The first stage has no routed heads.
    balance = [balance_loss(r) for name, r in routings.items() if "stages.0" not in name]
    assert len(balance) == (3 if kind == "moh" else 0)
    assert_close(loss, plain + 0.3 * sum(balance) / 3)


def test_a_model_without_routed_heads_has_no_balance_loss():
    model, labels = tiny(**ALL_ON), torch.tensor([0, 6, 3])
    assert_close(model(images(), labels).loss, model.train()(images(), labels).loss)


def test_labels_may_be_soft():
    model, labels = tiny(), torch.tensor([0, 6, 3])
    soft = 0.9 * one_hot(labels, CLASSES) + 0.1 / CLASSES
    got = model(images(), labels=soft)
    assert_close(got.loss, cross_entropy(got.logits, labels, label_smoothing=0.1))


@BOTH
def test_a_step_reaches_every_parameter(kind):
    model = tiny(kind).train()
    model(images(number=8), labels=torch.randint(CLASSES, (8,))).loss.backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


@BOTH
def test_gradient_checkpointing_changes_no_gradient(kind):
    def loss(model):
        torch.manual_seed(3)
        return model(images(), labels=torch.tensor([0, 6, 3])).loss

    assert_checkpointing_changes_none(lambda: tiny(kind, drop_path_rate=0.5).train(), loss)


@pytest.mark.parametrize("autocast", [True, False])
def test_it_runs_in_bfloat16(autocast):
    # Heads are all on: a router's choice may turn on a rounding.
    model = tiny(**ALL_ON)
    want = model(images()).logits
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.train()(images(), labels=torch.tensor([0, 6, 3]))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - want).norm() < 0.2 * want.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@BOTH
def test_it_saves_and_loads(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, TransNeXtForImageClassification)
    assert_close(again(images()).logits, model(images()).logits, rtol=0, atol=0)
    larger = AutoConfig.from_pretrained(tmp_path, image_size=40)
    assert (larger.image_size, larger.pretrain_size) == (40, 20)
    assert larger.hidden_sizes == TINY["hidden_sizes"]


def test_a_backbone_of_a_classifier(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    named = ["stage1", "stage3"]
    # AutoBackbone's own from_pretrained knows the hub only.
    assert isinstance(AutoBackbone.from_config(model.config), TransNeXtBackbone)
    backbone, told = TransNeXtBackbone.from_pretrained(
        tmp_path, out_features=named, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert backbone.channels == [10, 30]
    maps = model(images(31, 13), output_hidden_states=True).hidden_states
    got = backbone(images(31, 13))
    assert_close(got.feature_maps, (maps[0], maps[2]), rtol=0, atol=0)
    assert got.hidden_states is None
    as_tuple = backbone(images(31, 13), output_hidden_states=True, return_dict=False)
    assert_close(as_tuple, (got.feature_maps, maps), rtol=0, atol=0)


def test_a_segmentation_model_of_transformers_takes_the_backbone():
    config = TransNeXtConfig(**TINY | ROUTED, out_features=["stage1", "stage2", "stage3"])
    segmenter = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, hidden_size=11, pool_scales=[1, 2], use_auxiliary_head=False
        )
    ).eval()
    assert segmenter(images(23, 29)).logits.shape == (3, 2, 23, 29)


def test_an_image_processor(tmp_path):
    """The one that is registered: a file of settings without its name is enough."""
    TransNeXtConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 20, "width": 20}}')
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(processor)
    red = Image.new("RGB", (31, 13), (255, 0, 0))
    pixels = processor(red, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 20, 20)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
    assert_close(pixels[0, :, 3, 5], want, rtol=1e-5, atol=1e-5)
    assert tiny()(pixels).logits.shape == (1, CLASSES)


def test_flops_equal_torchs_counter():
    """To a hundredth: what looks at the windows is no matrix product, so torch may not count it."""
    sizes = TINY | {"hidden_sizes": (120, 240), "depths": (2, 1), "num_heads": (3, 5)}
    config = TransNeXtConfig(**sizes | {"mlp_ratios": (4, 4), "sr_ratios": (3, 1)})
    model = TransNeXtForImageClassification(config).eval()
    with torch.no_grad():
        measured = measure_flops(lambda: model(images(20, 26, 1)))
    flops = count_flops(model, image_size=(20, 26))
    assert sum(flops.values()) == pytest.approx(measured, rel=0.01)
    # A query sees 3 · 4 pooled keys; a window counts as 1.5 · 9.
    name = "backbone.stages.0.blocks.1"
    assert flops[f"{name}.attention"] == 130 * 4 * 120 * (12 + 13.5)
    assert flops[f"{name}.attention.kv_proj"] == (130 + 12) * 2 * 120 * 240
    assert flops[f"{name}.mlp.conv"] == 130 * 2 * 9 * 320
    assert flops["classifier"] == 2 * 240 * CLASSES


def test_heads_that_are_off_cost_no_flops():
    dense, routed = (count_flops(tiny(kind), image_size=20) for kind in KINDS)
    last = "backbone.stages.2.blocks.0.attention"
    assert dense[last] == 9 * 4 * 5 * 6 * 9
    assert routed[last] == 9 * 4 * 3 * 6 * 9
    assert routed[f"{last}.router.routed"] == 9 * 2 * 30 * 3
    assert set(routed) - set(dense) == {name for name in routed if "router" in name}
