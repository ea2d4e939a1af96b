"""`headwise bench`: our speed against rivals, on this machine."""

from headwise.bench import BENCHMARKS, BenchRun, bench
from headwise.ops.choice import look_up
from headwise.parsing import parsed


def main(argv: list[str]) -> None:
    """Run the command. The kind of benchmark may come first, without the name of its field."""
    if argv and not argv[0].startswith("-"):
        names = {name: name for name in ("all", *BENCHMARKS, "scaling")}
        argv = ["--which", look_up("benchmark", argv[0], names), *argv[1:]]
    bench(parsed(BenchRun, argv, "headwise bench"))
