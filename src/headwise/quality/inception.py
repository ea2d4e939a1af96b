"""The Inception network of 2015 by whose features published FIDs are measured.

**Source**: Szegedy et al. (arXiv 1512.00567), as in TensorFlow's graph of 2015-12-05 with 1,008
classes. No library that works without torchvision has this version of it.
"""

import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from headwise.quality.features import Features, spatial_features

_SIZE = 299


def load_inception(path: str | os.PathLike[str]) -> "Inception":
    """Inception with weights from a file, in eval mode on the CPU.

    Args:
        path: The state dict that torch-fidelity and pytorch-fid publish
            (weights-inception-2015-12-05-6726825d.pth, pt_inception-2015-12-05-6726825d.pth), or
            the same as safetensors. Only tensors are read: the TorchScript file of StyleGAN's
            metrics (inception-2015-12-05.pt), which holds code, is refused.

    Raises:
        ValueError: If there is no file, it holds anything but tensors, or a tensor is missing, left
            over or misshapen.
        OSError: If the file cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"path is {os.fspath(path)}, where there is no file")
    try:
        weights = _tensors(path)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(
            f"{path} is no state dict of tensors alone; give the file "
            "weights-inception-2015-12-05-6726825d.pth or its safetensors"
        ) from None
    model = Inception()
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit Inception of 2015: {error}") from None
    return model.float().eval().requires_grad_(False)


def _tensors(path: str | os.PathLike[str]) -> Any:
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that a file is TorchScript before it refuses it
        return torch.load(path, map_location="cpu", weights_only=True)


class Inception(nn.Sequential):
    """Images to the features of FID, sFID and the Inception Score.

    pooled, [N, 2048], is the mean of the last map; logits, [N, 1008], are without bias, as the
    Inception Score takes them; spatial, [N, 2023], are 7 channels of "mixed_6/conv" at 17 × 17
    positions. Parameters have the names of torchvision's Inception.
    """

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                Conv2d_1a_3x3=_convolution(3, 32, 3, stride=2),
                Conv2d_2a_3x3=_convolution(32, 32, 3, padded=False),
                Conv2d_2b_3x3=_convolution(32, 64, 3),
                MaxPool_1=nn.MaxPool2d(3, 2),
                Conv2d_3b_1x1=_convolution(64, 80, 1),
                Conv2d_4a_3x3=_convolution(80, 192, 3, padded=False),
                MaxPool_2=nn.MaxPool2d(3, 2),
                Mixed_5b=_mixed_5(192, pooled=32),
                Mixed_5c=_mixed_5(256, pooled=64),
                Mixed_5d=_mixed_5(288, pooled=64),
                Mixed_6a=_reduce_to_6(288),
                Mixed_6b=_mixed_6(768, inner=128),
                Mixed_6c=_mixed_6(768, inner=160),
                Mixed_6d=_mixed_6(768, inner=160),
                Mixed_6e=_mixed_6(768, inner=192),
                Mixed_7a=_reduce_to_7(768),
                Mixed_7b=_mixed_7(1280, _average()),
                # The graph has a maximum here, which the paper does not.
                Mixed_7c=_mixed_7(2048, nn.MaxPool2d(3, 1, padding=1)),
                fc=nn.Linear(2048, 1008),
            )
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of images uint8 [N, 3, H, W] of any size.

        Raises:
            ValueError: If they are of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; they must be uint8 [N, 3, H, W], "
                "grey ones repeated three times"
            )
        head = self.get_parameter("fc.weight")
        x = (resize_like_tensorflow(images.to(head), _SIZE) - 128) / 128
        for name, layer in list(self.named_children())[:-1]:
            x = layer(x)
            if name == "Mixed_6d":
                spatial = spatial_features(x)  # the branch of 1 × 1 comes first
        pooled = x.mean((2, 3))
        return Features(pooled, pooled @ head.T, spatial)


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear, with output pixel i at i · in / out of the input, as in TensorFlow 1.

    torch puts pixel centres at (i + ½) · in / out - ½, which shifts the image.

    Args:
        images: [N, C, H, W], floating point.
        size: Side of the result, in pixels.

    Returns:
        [N, C, size, size].
    """
    down, across = (_weights(images, side, size) for side in images.shape[2:])
    return torch.einsum("oh,nchw,pw->ncop", down, images, across)


def _weights(like: Tensor, side: int, size: int) -> Tensor:
    """What each of the output's pixels takes of the input's, [size, side]."""
    pixels = torch.arange(side, device=like.device)
    position = (torch.arange(size, device=like.device) * (side / size)).clamp(max=side - 1)
    return (1 - (position[:, None] - pixels).abs()).clamp(min=0).to(like)


class Branches(nn.Module):
    """Branches side by side, joined along the channels.

    A branch is a list of steps; the modules of a step read the same and are joined too.
    """

    def __init__(self, *branches: list[dict[str, nn.Module]]):
        super().__init__()
        for branch in branches:
            for step in branch:
                for name, module in step.items():
                    self.add_module(name, module)
        self._names = [[list(step) for step in branch] for branch in branches]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._names:
            y = x
            for step in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in step], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _chain(**modules: nn.Module) -> list[dict[str, nn.Module]]:
    return [{name: module} for name, module in modules.items()]


def _convolution(
    width: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, padded: bool = True
) -> nn.Module:
    """With batch norm and ReLU; keeps the size if it is padded and has stride 1."""
    padding = "same" if padded and stride == 1 else 0
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(width, out, kernel, stride, padding, bias=False),
            bn=nn.BatchNorm2d(out, eps=1e-3),
            relu=nn.ReLU(),
        )
    )


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)


def _mixed_5(width: int, pooled: int) -> Branches:
    """Figure 5 of the paper, at 35 × 35."""
    return Branches(
        _chain(branch1x1=_convolution(width, 64, 1)),
        _chain(branch5x5_1=_convolution(width, 48, 1), branch5x5_2=_convolution(48, 64, 5)),
        _chain(
            branch3x3dbl_1=_convolution(width, 64, 1),
            branch3x3dbl_2=_convolution(64, 96, 3),
            branch3x3dbl_3=_convolution(96, 96, 3),
        ),
        _chain(pool=_average(), branch_pool=_convolution(width, pooled, 1)),
    )


def _reduce_to_6(width: int) -> Branches:
    return Branches(
        _chain(branch3x3=_convolution(width, 384, 3, stride=2)),
        _chain(
            branch3x3dbl_1=_convolution(width, 64, 1),
            branch3x3dbl_2=_convolution(64, 96, 3),
            branch3x3dbl_3=_convolution(96, 96, 3, stride=2),
        ),
        _chain(pool=nn.MaxPool2d(3, 2)),
    )


def _mixed_6(width: int, inner: int) -> Branches:
    """Figure 6 of the paper, at 17 × 17."""
    return Branches(
        _chain(branch1x1=_convolution(width, 192, 1)),
        _chain(
            branch7x7_1=_convolution(width, inner, 1),
            branch7x7_2=_convolution(inner, inner, (1, 7)),
            branch7x7_3=_convolution(inner, 192, (7, 1)),
        ),
        _chain(
            branch7x7dbl_1=_convolution(width, inner, 1),
            branch7x7dbl_2=_convolution(inner, inner, (7, 1)),
            branch7x7dbl_3=_convolution(inner, inner, (1, 7)),
            branch7x7dbl_4=_convolution(inner, inner, (7, 1)),
            branch7x7dbl_5=_convolution(inner, 192, (1, 7)),
        ),
        _chain(pool=_average(), branch_pool=_convolution(width, 192, 1)),
    )


def _reduce_to_7(width: int) -> Branches:
    return Branches(
        _chain(
            branch3x3_1=_convolution(width, 192, 1),
            branch3x3_2=_convolution(192, 320, 3, stride=2),
        ),
        _chain(
            branch7x7x3_1=_convolution(width, 192, 1),
            branch7x7x3_2=_convolution(192, 192, (1, 7)),
            branch7x7x3_3=_convolution(192, 192, (7, 1)),
            branch7x7x3_4=_convolution(192, 192, 3, stride=2),
        ),
        _chain(pool=nn.MaxPool2d(3, 2)),
    )


def _mixed_7(width: int, pool: nn.Module) -> Branches:
    """Figure 7 of the paper, at 8 × 8."""
    wide, high = (1, 3), (3, 1)
    return Branches(
        _chain(branch1x1=_convolution(width, 320, 1)),
        [
            {"branch3x3_1": _convolution(width, 384, 1)},
            {
                "branch3x3_2a": _convolution(384, 384, wide),
                "branch3x3_2b": _convolution(384, 384, high),
            },
        ],
        [
            {"branch3x3dbl_1": _convolution(width, 448, 1)},
            {"branch3x3dbl_2": _convolution(448, 384, 3)},
            {
                "branch3x3dbl_3a": _convolution(384, 384, wide),
                "branch3x3dbl_3b": _convolution(384, 384, high),
            },
        ],
        _chain(pool=pool, branch_pool=_convolution(width, 192, 1)),
    )
