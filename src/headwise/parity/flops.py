"""FLOPs of a model by formula, module by module."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from headwise.nn import (
    CosineRouter,
    FittedExpertRouter,
    FittedRouter,
    HeadBudget,
    LinearRouter,
    MoE,
    Router,
)
from headwise.nn.bitlinear import PackedExperts, PackedLinear
from headwise.nn.experts import Experts
from headwise.nn.routers import ScoreMap
from headwise.ops.fields import Count, checked

# What transformers and diffusers call the channels of a head, and their number.
_HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "heads")
# Modules that read one token of a sequence, or what holds for all of them, as the time of a DiT; in
# diffusers' DiT that is norm1 and proj_out_1.
_ONCE = {
    "pooler", "classifier", "seq_relationship", "modulation", "time_embedding",
    "norm1", "proj_out_1",
}  # fmt: skip


class Reads(NamedTuple):
    """What a module reads of an image: rows, and, if it attends, the keys that each row sees."""

    rows: float
    keys: float = 0


@checked
def count_flops(
    model: nn.Module,
    *,
    sequence_length: Count | None = None,
    image_size: Count | tuple[Count, Count] | None = None,
    causal: bool = True,
) -> dict[str, float]:
    """FLOPs of a forward per token, or per image, by module, by formula; their sum is the model's.

        matrices:   2 · rows · columns, once a token; experts top_k times for each sub-token
        attention:  4 · heads · channels · keys that a token sees, on average over the sequence
                    (T + 1) / 2 where it is causal, W · (2·T - W + 1) / (2·T) in a window of W < T

    Heads that are off are not counted: the figure is what skipping can reach, not what an
    implementation that masks them spends. `measure_flops` counts what really runs. Of heads of
    different widths, the routed ones count as if each were on equally often.

    Averaged over the tokens of a sequence are the keys that they see, and what runs once a
    sequence: modules named pooler, classifier (but for classes of tokens), seq_relationship,
    modulation, time_embedding, norm1 and proj_out_1. (diffusers' DiT embeds time and class once
    more for its output, which is not counted.)
    A patch convolution counts for every token, also for a class token. Embeddings, norms, softmax
    and activations cost nothing.

    What the modules of a TransNeXt read of an image, its backbone says (`reads_of_image`). Windows
    count whole at borders too; the MLPs of its positions run once a batch and count for every
    image.

    Args:
        model: A layer of ours, a decoder or encoder of transformers, or diffusers' DiT, converted
            or not.
        sequence_length: T, tokens that attend to each other; the figures are per token.
        image_size: Side of an image, or height and width, in pixels; the figures are per image.
        causal: True counts the pairs of tokens that are seen: all of them in attention that says it
            is not causal (`is_causal`), as BERT's and ViT's; attention that says nothing counts as
            causal. False counts all T · T pairs everywhere.

    Returns:
        FLOPs of each module that costs any, per token or per image.

    Raises:
        ValueError: If sequence_length is below 1, both it and image_size are given or neither, the
            model does not say what it reads of an image, or a part of the model is of a kind that
            has no formula here: weights of an unknown module, cross attention, attention that does
            not say what heads it has, a window that is not causal.
    """
    if (sequence_length is None) == (image_size is None):
        raise ValueError(
            f"sequence_length is {sequence_length} and image_size is {image_size}; give one of them"
        )
    if sequence_length is None:
        assert image_size is not None
        return _flops_of_image(model, image_size)
    _refuse_cross_attention(model)
    once = _ONCE - {"classifier"} if "TokenClassification" in type(model).__name__ else _ONCE
    flops: dict[str, float] = {}
    rows: dict[str, float] = {}  # that a module reads for each token, where that is not one
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            rows[_child(name, "router")] = module.num_heads
            rows[_child(name, "experts")] = module.num_heads * module.router.top_k
        if once.intersection(name.split(".")):
            rows[name] = 1 / sequence_length
        cost = _matrix_flops(name, module) * rows.get(name, 1)
        if _is_attention(module):
            keys = _keys_seen(name, module, sequence_length) if causal else sequence_length
            cost += _flops_of_pair(name, module) * keys
        if cost:
            flops[name] = cost
    return flops


def router_share(model: nn.Module, flops: Mapping[str, float]) -> float:
    """Share of a forward's FLOPs by which routers compute their logits.

    Args:
        model: With or without routers.
        flops: Of each of its modules, as `count_flops` gives them.

    Returns:
        0..1; 0 also for routers without weights.
    """
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    spent = sum(cost for name, cost in flops.items() if not routers.isdisjoint(_around(name)))
    return spent / sum(flops.values())


def _around(name: str) -> list[str]:
    """Names of a module and of all that it lies in: "a.b" gives "", "a" and "a.b"."""
    parts = name.split(".")
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]


def _flops_of_image(model: nn.Module, image_size: int | tuple[int, int]) -> dict[str, float]:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    reads = {
        _child(name, part): read
        for name, module in model.named_modules()
        if hasattr(module, "reads_of_image")
        for part, read in module.reads_of_image(size).items()
    }
    if not reads:
        raise ValueError(
            f"image_size is {image_size}, but {type(model).__name__} has no reads_of_image that "
            "says what its modules read of an image; give a sequence_length"
        )
    flops: dict[str, float] = {}
    for name, module in model.named_modules():
        if name in reads and reads[name].keys:
            cost = _flops_of_pair(name, module) * reads[name].keys
        elif isinstance(module, nn.Conv2d):
            cost = 2 * module.weight.numel()
        else:
            cost = _matrix_flops(name, module)
        if cost:
            flops[name] = cost * _rows_of_image(name, reads)
    return flops


def _rows_of_image(name: str, reads: dict[str, Reads]) -> float:
    """What is not named reads the rows that the module around it reads; the model itself, one."""
    while name and name not in reads:
        name = name.rpartition(".")[0]
    return reads[name].rows if name in reads else 1


# A fitted router of heads that are all on has no weights.
_SCORES_LINEARLY = (LinearRouter, FittedExpertRouter, FittedRouter, ScoreMap)


def _matrix_flops(name: str, module: Any) -> int:
    """FLOPs of the module's own matrices for one row."""
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    # The linear layer of GPT-2 is known by its name, because transformers is not imported here.
    conv1d = type(module).__name__ == "Conv1D"
    if isinstance(module, _SCORES_LINEARLY) or conv1d or _is_patches(module):
        return 0 if module.weight is None else 2 * module.weight.numel()
    if isinstance(module, CosineRouter):
        return 2 * (module.projection.numel() + module.embedding.numel())
    if isinstance(module, Experts):
        return 2 * (module.first_proj[0].numel() + module.down_proj[0].numel())
    if isinstance(module, PackedLinear):
        return 2 * module.num_weights
    if isinstance(module, PackedExperts):
        return 2 * module.num_weights // module.num_experts
    if not isinstance(module, nn.Embedding):
        for parameter, shape in _matrices(module):
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__} with weights {parameter} "
                f"{list(shape)}, for which count_flops has no formula; measure_flops counts what "
                "runs"
            )
    return 0


def _matrices(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its own weights that it may multiply by; those of [1, …] are added, as positions are."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 1 and parameter.shape[0] > 1:
            yield name, parameter.shape


def _is_patches(module: nn.Module) -> bool:
    """A convolution that cuts its input into pieces, one for each token."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return isinstance(module, kinds) and tuple(module.kernel_size) == tuple(module.stride)


def _is_attention(module: nn.Module) -> bool:
    named = "Attention" in type(module).__name__ and _head_width(module) is not None
    return named or hasattr(module, "is_causal")


def _flops_of_pair(name: str, module: Any) -> float:
    """FLOPs of an attention for a token and a key that it sees, over the heads that are on."""
    budget: HeadBudget | None = getattr(getattr(module, "router", None), "budget", None)
    if (widths := getattr(module, "head_dims", None)) is not None:
        return 4 * _channels_on(widths, budget)
    heads = _num_heads(module) if budget is None else budget.active_heads
    width = _head_width(module)
    for what, value, fields in (
        ("how wide its heads are", width, _HEAD_WIDTHS),
        ("how many heads it has", heads, _HEAD_COUNTS),
    ):
        if value is None:
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__} that does not say {what}, as "
                f"{' or '.join(fields)}; measure_flops counts what runs"
            )
    return 4 * heads * width


def _channels_on(head_dims: tuple[int, ...], budget: HeadBudget | None) -> float:
    """Channels of the heads that a token has on, each of the routed ones equally often."""
    if budget is None or not budget.routed_heads:
        return sum(head_dims)
    shared = sum(head_dims[head] for head in budget.which_shared)
    return shared + (sum(head_dims) - shared) * budget.top_k / budget.routed_heads


def _head_width(module: Any) -> Any:
    if hasattr(module, "heads") and hasattr(module, "inner_dim"):  # diffusers' Attention
        return module.inner_dim // module.heads
    return next((getattr(module, field) for field in _HEAD_WIDTHS if hasattr(module, field)), None)


def _num_heads(module: nn.Module) -> Any:
    """Where the module does not say, the config that it was made from does."""
    places = (module, getattr(module, "config", None))
    counts = (getattr(place, field, None) for place in places for field in _HEAD_COUNTS)
    return next((count for count in counts if count is not None), None)


def _keys_seen(name: str, module: Any, length: int) -> float:
    """By a token, on average over the sequence."""
    config = getattr(module, "config", None)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    window = length if window is None else min(window, length)
    if getattr(module, "is_causal", getattr(module, "causal", True)):
        return window * (2 * length - window + 1) / (2 * length)
    if window < length:
        raise ValueError(
            f"{name or 'model'} is a {type(module).__name__} with a window of {window} that is not "
            f"causal, for which count_flops has no formula; give a sequence_length up to {window}"
        )
    return length


def _refuse_cross_attention(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    for field in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, field, False):
            raise ValueError(
                f"{type(model).__name__} has cross attention (config: {field}); count_flops has "
                "formulas for self-attention only"
            )
    for name, module in model.named_modules():
        if getattr(module, "is_cross_attention", False):
            raise ValueError(
                f"{name} is cross attention; count_flops has formulas for self-attention only"
            )


def _child(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
