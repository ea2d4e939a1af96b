"""The w×w window around each token of a map: which positions lie inside the image."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def inside(size: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """Whether window position w, row by row, of token t is inside the image: [T, w²]."""
    rows, columns = (_inside_axis(length, window, device) for length in size)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _inside_axis(length: int, window: int, device: torch.device) -> Tensor:
    at = torch.arange(length, device=device)[:, None] + torch.arange(window, device=device)
    at = at - window // 2
    return (at >= 0) & (at < length)


def shifted(x: Tensor, size: tuple[int, int], window: int) -> list[Tensor]:
    """What stands at each window position of every token, 0 outside: w² views [B, h, w, H, C]."""
    height, width = size
    reach = window // 2
    padded = pad(x.unflatten(1, size), (0, 0, 0, 0, reach, reach, reach, reach))
    return [padded[:, i : i + height, j : j + width] for i in range(window) for j in range(window)]
