"""Images of two classes that anything can tell apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def bright_and_dark(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a directory with two directories, each of so many squares of that shape."""

    def make(number: int, *shape: int) -> Path:
        root = tmp_path_factory.mktemp("pictures")
        generator = np.random.default_rng(0)
        for name, low in (("bright", 150), ("dark", 0)):
            (root / name).mkdir()
            for i in range(number):
                pixels = generator.integers(low, low + 100, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.png")
        return root

    return make
