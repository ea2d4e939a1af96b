import pytest
import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from headwise.quality.features import (
    ClassifierFeatures,
    Features,
    collect_features,
    spatial_features,
)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 22, "num_attention_heads": 2, "intermediate_size": 13}
    config = ViTConfig(num_hidden_layers=1, image_size=6, patch_size=2, num_labels=5, **sizes)
    return ViTForImageClassification(config).eval()


def test_transformers_vit(vit):
    images = torch.randn(3, 3, 6, 6)
    features = ClassifierFeatures(vit, spatial="vit.layernorm")(images)
    with torch.no_grad():
        tokens = vit.vit(images).last_hidden_state
        torch.testing.assert_close(features.logits, vit(images).logits)
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.spatial, tokens[:, :, :7].reshape(3, 10 * 7))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


def test_transformers_resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 7, "hidden_sizes": [11, 13], "depths": [1, 1]}
    config = ResNetConfig(layer_type="basic", num_labels=5, **sizes)
    model = ResNetForImageClassification(config).eval()
    images = torch.randn(3, 3, 32, 32)
    features = ClassifierFeatures(model, spatial="resnet.encoder.stages.0")(images)
    with torch.no_grad():
        output = model.resnet(images, output_hidden_states=True)
    torch.testing.assert_close(features.pooled, output.pooler_output.flatten(1))
    assert features.pooled.shape == (3, 13)
    torch.testing.assert_close(features.spatial, output.hidden_states[1][:, :7].flatten(1))


def test_plain_classifier():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    images = torch.randn(5, 1, 2, 2)
    features = ClassifierFeatures(model, head="3")(images)
    torch.testing.assert_close(features.pooled, model[:3](images))
    torch.testing.assert_close(features.logits, model(images))
    assert features.spatial is None


def test_spatial_features_are_seven_channels_at_all_positions():
    convolution = torch.arange(2 * 11 * 3 * 5).reshape(2, 11, 3, 5)
    assert torch.equal(spatial_features(convolution), convolution[:, :7].reshape(2, 105))
    tokens = convolution.flatten(2).transpose(1, 2)
    assert spatial_features(tokens)[1].unique().tolist() == convolution[1, :7].flatten().tolist()


def test_batches_make_no_difference(vit):
    images = torch.randn(7, 3, 6, 6)
    network = ClassifierFeatures(vit, spatial="vit.layernorm")
    whole, parts = network(images), collect_features(images.split(3), network)
    assert len(parts) == 7
    for name in ("pooled", "logits", "spatial"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "fc"}, "head is 'fc'; the model has no such module, it has vit, classifier"),
        ({"spatial": "vit.norm"}, "spatial is 'vit.norm'"),
    ],
)
def test_unknown_modules(vit, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFeatures(vit, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "vit.layernorm"}, r"the head reads \[2, 10, 22\]"),
        ({"head": "vit"}, r"the head reads \[2, 3, 6, 6\]"),
        ({"spatial": "vit"}, "spatial makes BaseModelOutput"),
        ({"spatial": "classifier"}, r"spatial activations are \[2, 5\]"),
    ],
)
def test_modules_that_do_not_fit(vit, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFeatures(vit, **arguments)(torch.randn(2, 3, 6, 6))


def test_training_mode_is_refused(vit):
    with pytest.raises(ValueError, match="training mode"):
        ClassifierFeatures(vit.train())


def test_bad_features():
    two, three = torch.randn(2, 5), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"logits is \[3, 5\] and pooled \[2, 5\]"):
        Features(two, three)
    with pytest.raises(ValueError, match=r"spatial is \[2, 5, 1\]"):
        Features(two, two, two[..., None])
    with pytest.raises(ValueError, match="pooled has values that are NaN"):
        Features(two / 0, two)
    with pytest.raises(ValueError, match="no images"):
        collect_features([], lambda images: Features(images, images))
    with pytest.raises(ValueError, match=r"pooled has .* in different batches"):
        collect_features([two, two[:, :4]], lambda images: Features(images, images))
    with pytest.raises(ValueError, match=r"spatial has .* in different batches"):
        collect_features([two, three], lambda i: Features(i, i, i if len(i) > 2 else None))
