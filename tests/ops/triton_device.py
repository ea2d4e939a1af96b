"""Where the tests of Triton kernels run: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

tl = pytest.importorskip("triton.language", reason="triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# conftest.py asks for the interpreter; who imports triton before it gets none.
RUNNABLE = pytest.mark.skipif(
    not ON_GPU and type(tl.max).__name__ == "JITFunction",
    reason="no GPU, and TRITON_INTERPRET=1 was not set when triton was first imported",
)
