import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headwise.quality.inception import Inception, load_inception, resize_like_tensorflow
from headwise.quality.metrics import sample_quality

# Of the published file.
SHAPES = {
    "Conv2d_1a_3x3.conv.weight": [32, 3, 3, 3],
    "Mixed_5b.branch5x5_2.conv.weight": [64, 48, 5, 5],
    "Mixed_6a.branch3x3dbl_3.conv.weight": [96, 96, 3, 3],
    "Mixed_6d.branch7x7dbl_4.conv.weight": [160, 160, 7, 1],
    "Mixed_6e.branch_pool.bn.running_mean": [192],
    "Mixed_7a.branch7x7x3_2.conv.weight": [192, 192, 1, 7],
    "Mixed_7c.branch3x3dbl_3b.conv.weight": [384, 384, 3, 1],
    "fc.weight": [1008, 2048],
}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    model = Inception()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model.state_dict()


def random_images(count, *size):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def test_parameters():
    with torch.device("meta"):
        model = Inception()
    # torchvision's 27,161,264 less its auxiliary head's 3,326,696, with 1,008 classes for 1,000.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 27_161_264 - 3_326_696 + 8 * 2049
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.items() >= SHAPES.items()


def test_weights_from_a_file_and_features_of_images_of_any_size(weights, tmp_path):
    # The published file has no counters of batches.
    published = {name: t for name, t in weights.items() if "num_batches" not in name}
    torch.save(published, tmp_path / "inception.pth")
    save_file(published, tmp_path / "inception.safetensors")
    model, other = (load_inception(tmp_path / f"inception.{s}") for s in ("pth", "safetensors"))
    assert not model.training
    images = random_images(2, 11, 13)
    features = model(images)
    assert [list(t.shape) for t in (features.pooled, features.logits, features.spatial)] == [
        [2, 2048],
        [2, 1008],
        [2, 7 * 17 * 17],
    ]
    torch.testing.assert_close(features.logits, features.pooled @ weights["fc.weight"].T)
    # An image's features do not depend on its batch mates, nor on the form of the file.
    alone = other(images[1:])
    for name in ("pooled", "logits", "spatial"):
        expected = getattr(features, name)[1:]
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            getattr(alone, name) / scale, expected / scale, rtol=1e-4, atol=1e-5
        )


def test_spatial_features_are_those_of_the_branch_of_one_by_one(weights):
    model = Inception().eval()
    model.load_state_dict(weights)
    seen = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output))
    features = model(random_images(1, 17, 17))
    torch.testing.assert_close(features.spatial, seen[0][:, :7].flatten(1))


def test_measures_take_its_features(weights):
    model = Inception().eval()
    model.load_state_dict(weights)
    features = model(random_images(4, 5, 5))
    # Only the pooled ones: a covariance of 2,023 values takes long.
    quality = sample_quality(*[type(features)(features.pooled[:, :5], features.logits)] * 2)
    assert quality.fid == pytest.approx(0, abs=1e-6 * float(features.pooled.var()))
    assert (quality.precision, quality.recall) == (1, 1)


def test_resize_puts_pixels_where_tensorflow_does():
    image = torch.tensor([[0.0, 2.0], [4.0, 6.0]])[None, None]
    # Positions 0, 1/2, 1, and 3/2 at the edge.
    expected = [[0, 1, 2, 2], [2, 3, 4, 4], [4, 5, 6, 6], [4, 5, 6, 6]]
    assert resize_like_tensorflow(image, 4)[0, 0].tolist() == expected
    assert torch.equal(resize_like_tensorflow(image, 2), image)
    line = torch.arange(6.0).expand(1, 1, 6, 6)
    assert resize_like_tensorflow(line, 4)[0, 0, 0].tolist() == [0, 1.5, 3, 4.5]


def test_bad_images():
    with torch.device("meta"):
        model = Inception()
    for images in (torch.zeros(1, 3, 5, 5), torch.zeros(1, 1, 5, 5, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"they must be uint8 \[N, 3, H, W\]"):
            model(images)


def test_bad_files(tmp_path):
    script = tmp_path / "inception-2015-12-05.pt"
    with zipfile.ZipFile(script, "w") as archive:  # what makes an archive TorchScript's
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"archive/{name}", "3\n")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    torch.save(nn.Linear(2, 3), tmp_path / "pickled.pth")
    for name in (script.name, "empty.pth", "broken.safetensors", "pickled.pth"):
        with pytest.raises(ValueError, match=f"{name} is no state dict of tensors alone"):
            load_inception(tmp_path / name)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"(?s)does not fit Inception.*Conv2d_1a.*\[1008, 2048\]"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"path is .*nowhere\.pth, where there is no file"):
        load_inception(tmp_path / "nowhere.pth")
