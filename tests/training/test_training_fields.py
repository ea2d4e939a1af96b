"""A precision that a processor multiplies slowly is said to be slow."""

import warnings

import pytest

from headwise.training.fields import warn_if_emulated


def levels(monkeypatch, *names: str) -> None:
    monkeypatch.setattr("headwise.training.fields.levels_here", lambda: iter(names))


def test_bf16_without_avx512_warns(monkeypatch):
    levels(monkeypatch, "avx2")
    with pytest.warns(UserWarning, match="precision is 'bf16'.*without AVX-512.*take 'fp32'"):
        warn_if_emulated("bf16", "cpu")


@pytest.mark.parametrize(
    ("names", "precision", "device"),
    [
        (["avx2"], "fp32", "cpu"),
        (["avx2"], "bf16", "cuda"),
        (["avx512", "avx2"], "bf16", "cpu"),
        ([], "bf16", "cpu"),  # another architecture
    ],
)
def test_what_is_fast_or_unknown_does_not_warn(monkeypatch, names, precision, device):
    levels(monkeypatch, *names)
    with warnings.catch_warnings(action="error"):
        warn_if_emulated(precision, device)
