"""Bad and odd input for every command and field: no traceback, crash, hang, or file touched.

    python tests/fuzz.py --seed 0 --cases 2000

It lies beside the tests, not in benchmarks/, as it asks what is right and not what is fast; a few
of its cases are a test. Fields are found in the dataclasses of the runs, so that new ones are asked
too. Each case runs the command in a process of its own, forked after the imports, with a limit of
time and memory.
What trains is given tiny sizes; most runs end as the first model would train, one in five of text
goes on to the end. What was accepted is listed at the end, for people to look at.
"""

import argparse
import dataclasses
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

# Nothing asks a network, and no thread is there that a fork would lose.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "80"}

import torch

from damage import contents
from fuzz_inputs import write_inputs

SECONDS, MEMORY = 60, 4 * 2**30
# What a command may say before it fails.
_NOTES = ("asking the Hugging Face hub", "headwise computes without its C++ kernels")
_INTERRUPTED = 99  # the status of a run that would have trained

NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "257", "4294967296", "9223372036854775808", "1000000000000",
    "1e30", "nan", "inf", "-inf", "1e-320", "1e308", "-0.0", "0.5", "1.5", "1_0", "0x10", "٣",
)  # fmt: skip
TEXTS = (
    "", " ", "x", "ü 蛇 😀", "\udcff", "a\0b", "\x1b[2J", "[/b]", "[/INST]", ":smile:", "-", "--",
    "a\nb", "a" * 5000, "None", "True", "[]", "{}", "a,b", "*", "~", "$HOME", "%s", "{0}", "\\",
    "digits",
)  # fmt: skip


_LAYERS = "--dim 48 --num-heads 4 --num-layers 2 --mlp-dim 128 --vocab-size 300"
_TUNED = "-o run --sequence-length 8 --batch-size 2 --routed.steps 1"
_GENERATED = ["#max_new_tokens", "#temperature", "#seed", "prompt"]
_PARITY = "--dim 8 --num-experts 4 --top-k 1 --expert-dim 8 --heads 2"


class Case(NamedTuple):
    """Arguments, and whether a training goes on to its end."""

    arguments: list[str]
    whole: bool


class Outcome(NamedTuple):
    """What became of a case: "refused", "accepted", "would train", or what is wrong with it."""

    kind: str
    said: str


class Commands:
    """What a good call of each command is, and its fields."""

    def __init__(self, inputs: Path):
        # What commands import as they need it, once instead of in every process.
        import headwise.commands.eval.images
        import headwise.commands.eval.tasks
        import headwise.training.figure  # noqa: F401
        from headwise.bench import BenchRun
        from headwise.commands.convert import ConversionRun
        from headwise.commands.draw import DrawingRun
        from headwise.commands.eval.run import EvalRun
        from headwise.commands.parity import ParityRun
        from headwise.commands.write_text import WritingRun
        from headwise.recipes import RECIPES, recipe_run
        from headwise.recipes.scales import SCALES
        from headwise.recipes.studies import STUDIES
        from headwise.recipes.tune import SCHEDULES

        dense, routed = str(inputs / "dense"), str(inputs / "converted")
        text = ["--data", str(inputs / "text.txt")]
        small = ["--steps", "1", "--warmup-steps", "0", "--output", "run", "--batch-size", "2"]
        layers = _LAYERS.split()
        tiny = {
            "lm": [*layers, *text, *["--sequence-length", "16", "--speed-contexts"]],
            "multilingual": [*layers, "--data", str(inputs / "domains"), "--sequence-length", "16"],
            "masked": [], "vit": [],
            "dit": ["--samples", "1", "--sampling-steps", "2"],
        }  # fmt: skip
        # The words of a good call, and the fields beside them.
        self.calls: dict[str, tuple[list[str], list[str]]] = {}
        for name in RECIPES:
            assert name in tiny, f"tiny lacks the arguments of a tiny run of the recipe {name}"
            self.calls[f"train {name}"] = ([*tiny[name], *small], _fields(recipe_run(name)))
        for name, study in STUDIES.items():
            kind = {"text": "lm"}.get(study.subject, study.subject)
            data = ["--data", str(inputs / "domains")] if name == "domains" else []
            call = ([*tiny[kind], *small, *data], _fields(SCALES["tiny"](name)))
            self.calls[f"experiment {name}"] = call
        tuned = SCHEDULES["small"](routed, Path("run"))
        stages = [
            f"{x}.{f.name}" for x in ("dense", "routed") for f in dataclasses.fields(tuned.dense)
        ]
        self.calls |= {
            "tune": ([routed, *_TUNED.split(), *text], [*_fields(tuned), *stages]),
            "convert": ([dense, "-o", "new"], _fields(ConversionRun)),
            "write-text": (
                [dense, "-o", "new.parquet", "--count", "2", "--length", "3"],
                _fields(WritingRun),
            ),
            "draw": (
                [str(inputs / "dit"), "-o", "new.png", "--steps", "1"],
                _fields(DrawingRun),
            ),
            "eval": ([str(inputs / "vit"), "--images", str(inputs / "images")], _fields(EvalRun)),
            "parity": (_PARITY.split(), _fields(ParityRun)),
            "bench": (["experts", "--quick", "--output", "new"], _fields(BenchRun)),
            "generate": ([dense, "--prompt", "a"], _GENERATED),
            "report": ([str(inputs / "run")], []),
            "env": ([], ["json"]),
            "compile": (["--no-such-option"], []),
        }  # fmt: skip
        self.paths = [str(path) for path in sorted(inputs.rglob("*"))]
        self.paths += ["missing", "missing/deep", "/proc/none/x", "/dev/null", ".", "..", "/"]

    def case(self, generator: random.Random) -> Case:
        """One with one to three odd things about it."""
        command = generator.choice([*self.calls])
        good, fields = self.calls[command]
        arguments = list(good)
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            self._spoil(arguments, fields, generator)
        # Studies and images take minutes.
        whole = generator.random() < 0.2 and command in ("train lm", "tune")
        return Case([*command.split(), *arguments], whole)

    def _spoil(self, arguments: list[str], fields: list[str], generator: random.Random) -> None:
        kind, field = generator.random(), generator.choice([*fields, ""])
        fitting = NUMBERS if field.startswith("#") else (*TEXTS, *self.paths)
        every = (*NUMBERS, *TEXTS, *self.paths)
        value = generator.choice(fitting if generator.random() < 0.8 else every)
        if kind < 0.75 and field:
            field = "--" + field.strip("#").replace("_", "-")
            more = [value] if generator.random() < 0.9 else [value, generator.choice(NUMBERS)]
            arguments += [field, *more]
        elif kind < 0.9 and arguments:
            arguments[generator.randrange(len(arguments))] = value
        elif kind < 0.95 and arguments:
            del arguments[generator.randrange(len(arguments))]
        else:
            arguments.insert(generator.randrange(len(arguments) + 1), value)


def _fields(run: Any) -> list[str]:
    """Those that have an option of their own, with "#" before those that hold a number."""
    kinds = get_type_hints(run if isinstance(run, type) else type(run), include_extras=True)
    named = {field.name: str(kinds[field.name]) for field in dataclasses.fields(run)}
    options = {name: kind for name, kind in named.items() if "Positional" not in kind}
    return [
        ("#" * ("int" in k or "float" in k)) + n for n, k in options.items() if "Suppress" not in k
    ]


class Trains(BaseException):
    """A run has been checked and its directory made: it would train now."""


def _stop(*_: Any, **__: Any) -> None:
    raise Trains


def _child(case: Case, directory: Path) -> None:
    """The command, in a directory of its own, its output in files beside it."""
    status = 70
    try:
        os.chdir(directory)
        # No compiler is found, and nothing that the user built.
        os.environ |= {"PATH": "", "XDG_CACHE_HOME": str(directory.with_suffix(".cache"))}
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(directory.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), number)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        import headwise.bench
        from headwise.cli import main
        from headwise.recipes import dit, tune
        from headwise.training import train

        headwise.bench.bench = _stop
        if not case.whole:
            train.train_one = train.try_one = train.side_by_side = tune._train = _stop
            dit.train_classifier = _stop
        try:
            main(case.arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except Trains:
            status = _INTERRUPTED
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def outcome_of(case: Case, directory: Path, inputs: dict[str, str], at: Path) -> Outcome:
    """Run it, and judge."""
    directory.mkdir()
    sys.stdout.flush()
    if not (pid := os.fork()):
        _child(case, directory)
    began = time.monotonic()
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() - began < SECONDS:
        time.sleep(0.003)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Outcome("hang", f"longer than {SECONDS} s")
    status = os.waitstatus_to_exitcode(ended[1])
    said = directory.with_suffix(".stderr").read_text(errors="replace")
    return Outcome(_kind(status, said, directory, _inputs(at) == inputs), said)


def _kind(status: int, said: str, directory: Path, inputs_stay: bool) -> str:
    if status < 0:
        return f"crash by signal {-status}"
    if not inputs_stay:
        return "input touched"
    if "Traceback" in said or status == 70:
        return "bug"
    if status in (0, _INTERRUPTED):
        return "accepted" if status == 0 else "would train"
    if status not in (1, 2):
        return f"odd status {status}"
    lines = [x for x in said.splitlines() if not any(note in x for note in _NOTES)]
    if len(lines) != 1 or not lines[0].startswith("headwise: "):
        return "not one line"
    return "files left" if status == 2 and any(directory.iterdir()) else "refused"


def _inputs(root: Path) -> dict[str, str]:
    """All of them but the page that `headwise report` draws where the record is."""
    return {name: x for name, x in contents(root).items() if Path(name).name != "report.html"}


FINE = ("refused", "accepted", "would train")


def fuzz(seed: int, cases: int, root: Path) -> list[tuple[Case, Outcome]]:
    """That many cases and what became of each."""
    inputs = root / "inputs"
    write_inputs(inputs)
    commands, before = Commands(inputs), _inputs(inputs)
    generator = random.Random(seed)
    results = []
    for number in range(cases):
        case = commands.case(generator)
        outcome = outcome_of(case, root / f"case{number}", before, inputs)
        results.append((case, outcome))
        if outcome.kind == "input touched":
            before = _inputs(inputs)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument(
        "--directory", type=Path, help="for inputs and outputs; a new one if not given"
    )
    given = parser.parse_args()
    root = given.directory or Path(tempfile.mkdtemp(prefix="headwise-fuzz-"))
    torch.set_num_threads(1)
    results = fuzz(given.seed, given.cases, root)
    for kind in sorted({outcome.kind for _, outcome in results}):
        if kind != "refused":
            print(f"\n== {kind}")
            for case, outcome in results:
                if outcome.kind == kind:
                    print(" ".join(map(ascii, case.arguments))[:400])
                    if kind not in FINE:
                        print(f"    {outcome.said.strip()[-400:]!a}")
    print(f"\n{dict(Counter(outcome.kind for _, outcome in results))}; {root}")
    sys.exit(any(outcome.kind not in FINE for _, outcome in results))


if __name__ == "__main__":
    main()
