"""What a network sees in images: the vectors that measures of generated images compare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of a map's channels, as the released evaluator of sFID (arXiv 2103.03841) takes them.
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """What a network makes of N images.

    Attributes:
        pooled: [N, D], a vector for each image, without positions.
        logits: [N, K] of K classes, before the softmax.
        spatial: [N, S], a vector with positions, see `spatial_features`; None where there is none.

    Raises:
        ValueError: If a field is not of that shape, the images differ in number, or a value is not
            finite.
    """

    pooled: Tensor
    logits: Tensor
    spatial: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("pooled", "logits", "spatial"):
            values = getattr(self, name)
            if values is None and name == "spatial":
                continue
            if values.ndim != 2 or len(values) != len(self.pooled):
                raise ValueError(
                    f"{name} is {list(values.shape)} and pooled {list(self.pooled.shape)}; both "
                    "must have two dimensions and a row for each image"
                )
            if not values.isfinite().all():
                raise ValueError(f"{name} has values that are NaN or infinite")

    def __len__(self) -> int:
        return len(self.pooled)


FeatureNetwork = Callable[[Tensor], Features]


def spatial_features(activations: Tensor) -> Tensor:
    """The first 7 channels of a map at all positions.

    **Source**: Nash et al. (arXiv 2103.03841), as computed by the evaluator of guided diffusion.

    Args:
        activations: [N, C, h, w] of a convolution, or [N, T, C] of tokens.

    Returns:
        [N, S], with S = 7·h·w or T·7 (fewer where C is less than 7).

    Raises:
        ValueError: If the activations have another number of dimensions.
    """
    if activations.ndim == 4:
        return activations[:, :SPATIAL_CHANNELS].flatten(1)
    if activations.ndim == 3:
        return activations[:, :, :SPATIAL_CHANNELS].flatten(1)
    raise ValueError(
        f"spatial activations are {list(activations.shape)}; they must be [N, C, h, w] or [N, T, C]"
    )


class ClassifierFeatures:
    """A classifier as a `FeatureNetwork`: what its head reads, what it says, a map on the way.

    Args:
        model: In eval mode; called with images [N, C, H, W] as it expects them, it returns logits
            [N, K], or an output that has them as `logits` (transformers' image classifiers).
        head: Name of the module whose input is the pooled features, [N, D] or [N, D, 1, 1].
        spatial: Name of a module whose output `spatial_features` takes. Default: none, no sFID.

    Raises:
        ValueError: If the model is in training mode, or has no module of that name; on a call, if
            the head reads something else.

    Example:
        >>> model = AutoModelForImageClassification.from_pretrained(path).eval()
        >>> network = ClassifierFeatures(model, spatial="vit.layernorm")
        >>> network(pixel_values).pooled
    """

    def __init__(self, model: nn.Module, *, head: str = "classifier", spatial: str | None = None):
        if model.training:
            raise ValueError("the model is in training mode; call its eval() first")
        modules = dict(model.named_modules())
        for field, name in (("head", head), ("spatial", spatial)):
            if name is not None and name not in modules:
                near = ", ".join(list(dict(model.named_children())))
                raise ValueError(
                    f"{field} is {name!r}; the model has no such module, it has {near}"
                )
        self._model = model
        self._head = modules[head]
        self._spatial = None if spatial is None else modules[spatial]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """The features of images [N, C, H, W], on the model's device."""
        seen: dict[str, Any] = {}
        hooks = [self._head.register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0]))]
        if self._spatial is not None:
            hooks.append(
                self._spatial.register_forward_hook(lambda _, __, out: seen.update(spatial=out))
            )
        try:
            output = self._model(images)
        finally:
            for hook in hooks:
                hook.remove()
        pooled, spatial = seen.get("pooled"), seen.get("spatial")
        if pooled is None or pooled.shape[2:].numel() != 1:
            reads = "nothing" if pooled is None else list(pooled.shape)
            raise ValueError(f"the head reads {reads}; name the module that reads [N, D]")
        if self._spatial is not None and not isinstance(spatial, Tensor):
            made = type(spatial).__name__
            raise ValueError(f"spatial makes {made}; name a module that makes one tensor")
        return Features(
            pooled.flatten(1),
            getattr(output, "logits", output),
            None if spatial is None else spatial_features(spatial),
        )


def collect_features(batches: Iterable[Tensor], network: FeatureNetwork) -> Features:
    """The features of all images of all batches, in order, where the network left them.

    Args:
        batches: Of images, as the network expects them; read once, one after the other.
        network: Such as `ClassifierFeatures`, or a function of one's own.

    Raises:
        ValueError: If there is no batch, or features differ in size from batch to batch.
    """
    collected = [network(batch) for batch in batches]
    if not collected:
        raise ValueError("there are no images; give at least one batch")
    parts: dict[str, Any] = {}
    for name in ("pooled", "logits", "spatial"):
        tensors = [getattr(features, name) for features in collected]
        sizes = {None if tensor is None else tensor.shape[1] for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(
                f"{name} has {sorted(map(str, sizes))} values in different batches; images of one "
                "size give the same number"
            )
        parts[name] = None if tensors[0] is None else torch.cat(tensors)
    return Features(**parts)
