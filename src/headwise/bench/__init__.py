"""The protocol behind every speed that headwise states, on the user's own machine."""

from headwise.bench.run import BENCHMARKS, BenchRun, bench

__all__ = ["BENCHMARKS", "BenchRun", "bench"]
