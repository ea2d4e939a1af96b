"""Which of many things are taken: by chance, a few that lie evenly, or one half or the other."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def draw(things: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` indices of `things` things by chance; none comes again before all were drawn."""
    rounds = [generator.permutation(things) for _ in range(-(-count // things))]
    return np.concatenate(rounds)[:count] if rounds else np.empty(0, dtype=np.int64)


def spread(things: int, most: int) -> NDArray[np.int64]:
    """At most `most` indices of `things` things, evenly from the first to the last.

    Example: of 10 things, 4 are 0, 3, 6 and 9.
    """
    return np.linspace(0, things - 1, min(most, things)).round().astype(np.int64)


def halves(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of things in two halves of about the same size together.

    The largest come first, each goes to the half that is smaller so far, or else to the second.

    Example: of sizes 5, 9, 4 and 3, the 9 goes to the second half, 5 and 4 to the first, and the 3,
    at 9 on either side, to the second: [0, 2] and [1, 3].
    """
    parts: tuple[list[int], list[int]] = [], []
    sums = [0, 0]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        half = int(sums[1] <= sums[0])
        parts[half].append(index)
        sums[half] += sizes[index]
    return sorted(parts[0]), sorted(parts[1])


def halves_of_classes(classes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of things in two halves, to each of which goes every second thing of each class.

    Where their number is odd, the second half has one more.

    Example: of classes 1, 0, 1 and 0, the first of each class are in the second half: [2, 3] and
    [0, 1].
    """
    by_class = np.argsort(classes, kind="stable")
    return np.sort(by_class[1::2]), np.sort(by_class[::2])
