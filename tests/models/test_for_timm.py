"""The published sizes in timm's registry: created, called, trained and refused as timm's own."""

import importlib
import sys

import pytest
import torch
from torch.testing import assert_close

from headwise import balance_loss, record_routing
from headwise.models import TransNeXtConfig, TransNeXtForImageClassification


def test_without_timm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "headwise.models.transnext.for_timm", raising=False)
    with pytest.raises(ValueError, match=r"registry needs timm, and torchvision.*pip install timm"):
        importlib.import_module("headwise.models.transnext.for_timm")


@pytest.fixture
def timm():
    """timm, with our models in its registry."""
    found = pytest.importorskip("timm", reason="timm is not installed (it needs torchvision)")
    importlib.import_module("headwise.models.transnext.for_timm")
    return found


# Of the smallest preset, made smaller.
SMALL = {
    "img_size": 20, "patch_size": 2, "hidden_sizes": (10, 18, 30), "depths": (1, 2, 1),
    "num_heads": (2, 3, 5), "mlp_ratios": (3, 2, 2.5), "sr_ratios": (3, 2, 1),
    "shared_heads": (2, 0, 2), "active_heads": (2, 1, 3), "drop_path_rate": 0.0,
}  # fmt: skip
IMAGES = torch.randn(3, 5, 20, 20, generator=torch.Generator().manual_seed(1))


def small(timm, **changes):
    torch.manual_seed(0)
    return timm.create_model("transnext_micro", in_chans=5, **SMALL | changes).eval()


def test_all_published_sizes_are_registered(timm):
    want = {"transnext_micro", "transnext_tiny", "transnext_small", "transnext_base"}
    want |= {f"moh_vit_{size}" for size in ("s_75", "s_80", "b_50", "b_75")}
    assert set(timm.list_models(module="timm")) == want
    with torch.device("meta"):
        model = timm.create_model("moh_vit_b_75", num_classes=11, in_chans=1)
        config = TransNeXtConfig.preset("moh-vit-b-75", num_labels=11, num_channels=1)
        want = TransNeXtForImageClassification(config).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in want.items()
    }
    assert (model.num_classes, model.num_features) == (11, 768)


def test_it_gives_the_logits_of_the_same_model(timm):
    model = small(timm, num_classes=7)
    plain = TransNeXtForImageClassification(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert_close(model(IMAGES), plain(IMAGES).logits)
    features = model.forward_features(IMAGES)
    assert_close(model.forward_head(features), model(IMAGES))
    assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (5, 20, 20)


def test_it_trains_with_checkpointing_as_without_and_routes(timm):
    gradients = []
    for checkpointing in (False, True):
        model = small(timm, num_classes=7).train()
        model.set_grad_checkpointing(checkpointing)
        with record_routing(model) as routings:
            logits = model(IMAGES)
        routed = [r for r in routings.values() if r.probabilities.shape[-1]]
        loss = model.routing_loss(routings)
        assert_close(loss, 0.01 * torch.stack([balance_loss(r) for r in routed]).mean())
        (torch.nn.functional.cross_entropy(logits, torch.tensor([1, 6, 0])) + loss).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(*gradients)


def test_the_classifier_is_another_or_none(timm):
    model = small(timm, num_classes=7)
    pooled = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    model.reset_classifier(2)
    assert model(IMAGES).shape == (3, 2)
    assert model.get_classifier().out_features == model.num_classes == 2
    for headless in (model, small(timm, num_classes=0)):
        headless.reset_classifier(0, "avg")
        assert headless.num_classes == 0
        assert_close(headless(IMAGES), pooled)


def test_what_timm_cannot_have_is_refused(timm):
    with pytest.raises(ValueError, match=r"pretrained is asked for.*load_released"):
        timm.create_model("moh_vit_b_75", pretrained=True)
    with pytest.raises(ValueError, match="unknown option 'num_clases'; did you mean 'num_classes'"):
        timm.create_model("moh_vit_b_75", num_clases=7)
    with pytest.raises(ValueError, match="global_pool is 'max'; it must be 'avg'"):
        small(timm).reset_classifier(2, "max")
