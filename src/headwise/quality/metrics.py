"""How good generated images are: FID, sFID, Inception Score, Precision and Recall.

FID is torchmetrics'. Its Inception Score shuffles with the global generator and is NaN where a
class has probability 0; ours is the three lines of the equation. Precision and Recall it has not.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.quality.features import Features

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except ImportError:
    raise ValueError(
        "measuring generated images needs torchmetrics, which is not installed; "
        "the extra diffusion has it: `pip install 'headwise[diffusion]'`"
    ) from None

# Samples of one Inception Score, as in the evaluator of guided diffusion.
_SPLIT = 5000
_DISTANCES_AT_ONCE = 2**24
_ROWS_AT_ONCE = 4096
_NEIGHBOURS = 3

# Images that `sample_quality` takes at least, of the real and of the generated ones.
FEWEST = _NEIGHBOURS + 1


@dataclass(frozen=True)
class SampleQuality:
    """How generated images compare with real ones.

    They compare only with numbers from the same network, the same real images and as many samples:
    FID falls and the Inception Score rises with more of them.

    Attributes:
        fid: Fréchet distance of the pooled features; 0 is best.
        sfid: The same of the spatial features; None where the network has none.
        inception_score: 1 to the number of classes, which is best.
        precision: Share of the generated images that look like real ones, 0..1.
        recall: Share of the real images that could have been generated, 0..1.
        num_real, num_generated: Images compared.
    """

    fid: float
    sfid: float | None
    inception_score: float
    precision: float
    recall: float
    num_real: int
    num_generated: int


def sample_quality(real: Features, generated: Features) -> SampleQuality:
    """All measures at once.

    Args:
        real, generated: Of the same network; `collect_features` makes them of batches of images.

    Raises:
        ValueError: If one is no `Features`, one has spatial features and the other has none, or a
            measure refuses them.

    Example:
        >>> network = ClassifierFeatures(classifier)
        >>> real = collect_features(batches_of_the_data, network)  # once for many models
        >>> sample_quality(real, collect_features(batches_of_samples, network)).fid
    """
    for name, features in (("real", real), ("generated", generated)):
        if not isinstance(features, Features):
            raise ValueError(
                f"{name} is a {type(features).__name__}; it must be Features, which "
                "collect_features makes of batches of images"
            )
    if (real.spatial is None) != (generated.spatial is None):
        raise ValueError("only one of real and generated has spatial features; use one network")
    sfid = None
    if real.spatial is not None and generated.spatial is not None:
        sfid = frechet_distance(real.spatial, generated.spatial)
    precision, recall = precision_and_recall(real.pooled, generated.pooled)
    return SampleQuality(
        fid=frechet_distance(real.pooled, generated.pooled),
        sfid=sfid,
        inception_score=inception_score(generated.logits),
        precision=precision,
        recall=recall,
        num_real=len(real),
        num_generated=len(generated),
    )


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Wasserstein distance of the Gaussians with the features' means and covariances.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), with covariances over N - 1, in float64. Of Inception's
    pooled features it is FID, of its spatial features sFID.

    **Source**: Heusel et al. (arXiv 1706.08500, eq. 6); sFID: Nash et al. (arXiv 2103.03841).

    Args:
        real: [N, D]. Fewer samples than D make the covariance singular: defined, but far off.
        generated: [M, D].

    Returns:
        At least 0, which equal sets have up to rounding.

    Raises:
        ValueError: If a set has fewer than 2 samples, NaN or infinite values, or one and the same
            vector for all; or if D differs.
    """
    _check(real, generated, at_least=2)
    # One process has all features, so there is nothing to gather from others.
    metric = FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False).to(real.device)
    # No distance changes when both sets move together, but less is lost in sums of squares.
    centre = real.double().mean(0)
    for features, is_real in ((real, True), (generated, False)):
        for rows in features.split(_ROWS_AT_ONCE):
            metric.update(rows.double() - centre, real=is_real)
    return max(float(metric.compute()), 0.0)


def inception_score(logits: Tensor) -> float:
    """exp(E[KL(p(y|x) ‖ p(y))]): how sure the network is of each image, and how varied they are.

    Equal to exp(entropy of the mean prediction - mean entropy of a prediction). The mean over parts
    of at most 5,000 samples, as published.

    **Source**: Salimans et al. (arXiv 1606.03498, section 4).
    **Deviates**: a part is every n-th sample, not a run of them, so that samples in the order of
        their classes do not lower the score.

    Args:
        logits: [N, K] of the generated images.

    Returns:
        1 (all predictions alike) to K (each certain, all classes equally often).

    Raises:
        ValueError: If logits is not [N, K], is empty or not finite.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits are {list(logits.shape)}; they must be [N, K], not empty")
    if not logits.isfinite().all():
        raise ValueError("logits have values that are NaN or infinite")
    parts = math.ceil(len(logits) / _SPLIT)
    scores = []
    for part in range(parts):
        p = logits[part::parts].double().softmax(-1)
        entropy_of_mean = torch.special.entr(p.mean(0)).sum()
        scores.append(float((entropy_of_mean - torch.special.entr(p).sum(-1).mean()).exp()))
    return statistics.fmean(scores)


def precision_and_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = _NEIGHBOURS
) -> tuple[float, float]:
    """Shares of each set that lie within the other's manifold.

    A set's manifold is the union of balls around its points, each as wide as the distance to the
    point's k-th nearest neighbour in the set. Precision is the share of generated points in the
    real manifold, recall that of real points in the generated one.

    **Source**: Kynkäänniemi et al. (arXiv 1904.06991, eq. 1 to 3).
    **Deviates**: distances are float64, not float16, and 0 between equal points.

    Args:
        real: [N, D].
        generated: [M, D].
        neighbours: k, at least 1. 3 is the published choice.

    Returns:
        Precision and recall, in 0..1. At most 2²⁴ distances are in memory at once.

    Raises:
        ValueError: If neighbours is less than 1, a set has no more samples than that, NaN or
            infinite values, or one and the same vector for all; or if D differs.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it must be at least 1")
    _check(real, generated, at_least=neighbours + 1)
    centre = real.double().mean(0)
    real, generated = real.double() - centre, generated.double() - centre
    real_radii, generated_radii = _radii(real, neighbours), _radii(generated, neighbours)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    within = 0
    rows = _rows(len(real))
    for points, radii in zip(generated.split(rows), generated_radii.split(rows), strict=True):
        distances = _squared_distances(points, real)
        within += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= radii[:, None]).any(0)
    return within / len(generated), float(covered.double().mean())


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Squared distance to the k-th nearest other point; the nearest of all is the point itself."""
    parts = points.split(_rows(len(points)))
    distances = (_squared_distances(some, points) for some in parts)
    return torch.cat([x.kthvalue(neighbours + 1, dim=1).values for x in distances])


def _rows(columns: int) -> int:
    return max(1, _DISTANCES_AT_ONCE // columns)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """[N, M] by one product; what is within its rounding of 0 is 0, as between equal points."""
    norms = first.square().sum(1)[:, None] + second.square().sum(1)
    squared = norms - 2 * first @ second.T
    return squared.where(squared > 1e-12 * norms, 0)


class _Given(nn.Identity):
    """Hands features on where torchmetrics expects the network that makes them."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _check(real: Tensor, generated: Tensor, at_least: int) -> None:
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) < at_least:
            raise ValueError(
                f"{name} features are {list(features.shape)}; they must be [N, D] with at least "
                f"{at_least} samples"
            )
        if not features.isfinite().all():
            raise ValueError(f"{name} features have values that are NaN or infinite")
        if (features == features[0]).all():
            raise ValueError(
                f"all {len(features)} {name} features are the same; give different images and a "
                "network that tells them apart"
            )
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real features have {real.shape[1]} values and generated {generated.shape[1]}; "
            "use one network for both"
        )
