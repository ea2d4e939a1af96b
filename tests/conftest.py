"""What every test shares: one thread, one seed, a way around the checks of types and shapes."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
# Without a GPU the kernels run in Triton's interpreter, which reads this as triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No jaxtyping inside: what it would refuse reaches the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
