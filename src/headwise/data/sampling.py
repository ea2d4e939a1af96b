"""Which of many things are taken: in an order by chance, or a few that lie evenly."""

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
