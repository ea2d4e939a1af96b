import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import KDTree
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torchmetrics.image.inception import InceptionScore

from headwise.quality.features import Features, collect_features
from headwise.quality.metrics import (
    SampleQuality,
    frechet_distance,
    inception_score,
    precision_and_recall,
    sample_quality,
)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(points, centres, k):
    """Share of the points within a ball around a centre, as the paper has it."""
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = [float((centre - c).norm()) for j, c in enumerate(centres) if j != i]
            if float((point - centre).norm()) <= sorted(others)[k - 1]:
                inside += 1
                break
    return inside / len(points)


class TestFrechetDistance:
    def test_worked_by_hand(self):
        # Covariances diag(2a²/3, 2b²/3): (a, b) is (3, 6) for the first set, (6, 3) for the second.
        cross = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
        first = cross * torch.tensor([3, 6])
        second = cross * torch.tensor([6, 3]) + torch.tensor([5, -7])
        # |Δμ|² + Σ (σ₁ - σ₂)² = 25 + 49 + 2 · (2/3) · 3²
        assert frechet_distance(first, second) == pytest.approx(74 + 12, rel=1e-12)

    def test_against_scipy_over_several_chunks(self):
        first, second = normal(0, 5003, 3) @ normal(1, 3, 3), normal(2, 4099, 3) @ normal(3, 3, 3)
        means = first.mean(0) - second.mean(0)
        covariances = [np.cov(x.numpy(), rowvar=False) for x in (first, second)]
        root = sqrtm(covariances[0] @ covariances[1]).real
        expected = float(means @ means) + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)

    def test_does_not_change_when_both_sets_move(self):
        first, second = normal(4, 31, 5), 2 * normal(5, 37, 5)
        moved = frechet_distance(first + 1e6, second + 1e6)
        assert moved == pytest.approx(frechet_distance(first, second), rel=1e-6)

    @pytest.mark.parametrize("width", [5, 61], ids=["full rank", "fewer samples than values"])
    def test_equal_sets_are_at_distance_0(self, width):
        features = normal(6, 31, width)
        assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-5)


class TestInceptionScore:
    def test_certain_and_varied_gives_the_number_of_classes(self):
        assert inception_score(1e3 * torch.eye(7)) == pytest.approx(7, rel=1e-12)

    def test_a_class_that_never_occurs_does_not_count(self):
        assert inception_score(1e5 * torch.eye(7)[:2]) == pytest.approx(2, rel=1e-12)

    def test_equal_predictions_give_1(self):
        assert inception_score(torch.randn(1, 5).expand(3, 5)) == pytest.approx(1, rel=1e-12)

    def test_worked_by_hand(self):
        # (3/4, 1/4) and (1/4, 3/4): ln 2 - (ln 4 - 3/4 ln 3)
        logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).double().log()
        assert inception_score(logits) == pytest.approx(3**0.75 / 2, rel=1e-12)

    def test_order_of_the_classes_does_not_lower_the_score_of_several_parts(self):
        logits = 1e3 * torch.eye(3).repeat_interleave(2000, dim=0)
        assert inception_score(logits) == pytest.approx(3, rel=1e-12)

    def test_as_torchmetrics(self):
        logits = normal(7, 53, 11)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of its memory and of one split's spread
            metric = InceptionScore(nn.Identity(), splits=1)
            metric.update(logits)
            expected = float(metric.compute()[0])
        assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


class TestPrecisionAndRecall:
    def test_worked_by_hand_on_a_line(self):
        # Radii to the third neighbour: 3, 2, 2, 3, 9 of the real, 3, 2, 2, 3, 14, 15 of the others.
        # 20 and 21 are outside the real balls; 0 is outside the others.
        real, generated = column(0, 1, 2, 3, 10), column(4, 5, 6, 7, 20, 21)
        assert precision_and_recall(real, generated) == (4 / 6, 4 / 5)

    def test_one_neighbour(self):
        real, generated = column(-2, 0, 1, 3), column(1.5, 4.5, 9, 10)
        assert precision_and_recall(real, generated, neighbours=1) == (1 / 2, 3 / 4)

    def test_as_loops(self):
        real, generated = normal(8, 31, 5), 1.5 * normal(9, 23, 5) + 0.5
        expected = by_loops(generated, real, 3), by_loops(real, generated, 3)
        assert 0 < expected[0] < expected[1] < 1
        assert precision_and_recall(real, generated) == pytest.approx(expected)

    def test_chunks_against_scipy(self):
        sets = normal(10, 5003, 2), 2 * normal(11, 4099, 2) + 1
        expected = []
        for points, centres in (sets[::-1], sets):
            radii = KDTree(centres).query(centres, k=4)[0][:, 3]
            balls = KDTree(points).query_ball_point(centres, radii)
            expected.append(len(set().union(*balls)) / len(points))
        assert precision_and_recall(*sets) == pytest.approx(expected, abs=1e-12)

    def test_equal_and_disjoint_sets(self):
        features = normal(12, 29, 7)
        assert precision_and_recall(features, features.flip(0)) == (1, 1)
        assert precision_and_recall(features, features + 1e3) == (0, 0)

    def test_equal_points_are_at_distance_0(self):
        # More copies of a point than neighbours: the balls around it have radius 0.
        points = normal(13, 4, 997)
        real = torch.cat([points[:1].expand(5, -1), points[1:]])
        generated = torch.cat([points[:1].expand(2, -1), points[1:] + 1e3])
        precision, _ = precision_and_recall(real, generated)
        assert precision == 2 / 5


GOOD = normal(14, 11, 3)
BAD = {
    "few": (GOOD[:1], GOOD, r"real features are \[1, 3\].* at least"),
    "nan": (GOOD, GOOD.where(GOOD < 1, torch.nan), "generated features .*NaN"),
    "constant": (GOOD[:1].expand(7, 3), GOOD, "all 7 real features are the same"),
    "shape": (GOOD, GOOD[0], r"generated features are \[3\]"),
    "sizes": (GOOD, GOOD[:, :2], "real features have 3 values and generated 2"),
}


@pytest.mark.parametrize("measure", [frechet_distance, precision_and_recall])
@pytest.mark.parametrize("name", BAD)
def test_bad_features(measure, name):
    real, generated, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        measure(real, generated)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\[3, 3\].* at least 4"):
        precision_and_recall(GOOD, GOOD[:3])
    with pytest.raises(ValueError, match="neighbours is 0"):
        precision_and_recall(GOOD, GOOD, neighbours=0)
    with pytest.raises(ValueError, match=r"logits are \[0, 3\]"):
        inception_score(GOOD[:0])
    with pytest.raises(ValueError, match="NaN"):
        inception_score(GOOD.where(GOOD < 1, torch.nan))


def test_all_measures_at_once():
    real = Features(normal(15, 11, 3), normal(16, 11, 5), normal(17, 11, 7))
    generated = Features(normal(18, 13, 3), normal(19, 13, 5), normal(20, 13, 7))
    quality = sample_quality(real, generated)
    precision, recall = precision_and_recall(real.pooled, generated.pooled)
    assert quality == SampleQuality(
        fid=frechet_distance(real.pooled, generated.pooled),
        sfid=frechet_distance(real.spatial, generated.spatial),
        inception_score=inception_score(generated.logits),
        precision=precision,
        recall=recall,
        num_real=11,
        num_generated=13,
    )
    without = [replace(features, spatial=None) for features in (real, generated)]
    assert sample_quality(*without) == replace(quality, sfid=None)
    with pytest.raises(ValueError, match="only one of real and generated has spatial"):
        sample_quality(real, without[1])


def test_real_digits_are_told_from_noise():
    pixels, labels = load_digits(return_X_y=True)
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(pixels, labels)
    noise = 16 * torch.rand(500, 64, generator=torch.Generator().manual_seed(0)).double()

    def network(images):
        return Features(images, torch.tensor(classifier.decision_function(images.numpy())))

    real, held_out, noise = (
        collect_features(images.split(128), network)
        for images in (torch.tensor(pixels[:900]), torch.tensor(pixels[900:]), noise)
    )
    good, bad = sample_quality(real, held_out), sample_quality(real, noise)
    assert good.fid < bad.fid / 10
    assert min(good.precision, good.recall) > 0.6
    assert (bad.precision, bad.recall) == (0, 0)
    assert bad.inception_score < 7 < good.inception_score < 10


def test_what_is_no_features_is_refused():
    features = Features(torch.randn(5, 3), torch.randn(5, 2))
    for given, name in (((features.pooled, features), "real"), ((features, [1]), "generated")):
        kind = type(given[name == "generated"]).__name__
        with pytest.raises(ValueError, match=f"{name} is a {kind}; .*collect_features makes"):
            sample_quality(*given)
