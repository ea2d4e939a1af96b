"""What every test shares: one thread, one seed, a way around the checks of types and shapes."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No jaxtyping inside: what it would refuse reaches the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
