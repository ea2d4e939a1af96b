"""The command `headwise`: parse, call, print."""

import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from safetensors import SafetensorError

from headwise.data.text import is_text
from headwise.errors import HeadwiseError, in_a_line, reading, reason
from headwise.ops.choice import look_up
from headwise.parsing import called, first_field, parsed

_USAGE = """usage: headwise COMMAND [OPTIONS]

  train RECIPE   train models and compare them        headwise train lm --help
  experiment X   repeat a study of the papers         headwise experiment --help
  convert PATH   route the heads of a model           headwise convert --help
  tune DIR       train a converted model further      headwise tune --help
  samples DIR    let a model write text to tune on    headwise samples --help
  generate DIR   continue a text with a saved model   headwise generate --help
  sample DIR     draw images with a trained DiT        headwise sample --help
  report DIR     draw a run's page again              headwise report --help
  eval DIR …     score models on tasks or on images   headwise eval --help
  parity         MH-MoE at a sparse MoE's cost        headwise parity --help
  compile        build the CPU kernels, once          headwise compile
  env            what is installed here, and missing  headwise env
  bench          measure speed on this machine        headwise bench --help

--debug, anywhere, shows the traceback of a command that fails.
"""

_DEBUG = "--debug"
_RESUMABLE = ("train", "experiment", "tune")
_BUG = 70  # EX_SOFTWARE of sysexits.h
_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Whatever goes wrong is one line: wrong input with status 2, a failed run with 1, a bug of ours
    with 70. With `--debug` its traceback comes before.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != _DEBUG] or ["--help"]
    try:
        try:
            _run(*arguments)
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_unread():
            # Python would flush again at its end, and say that it cannot.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(_CLOSED_PIPE) from None
        if _DEBUG in given:
            traceback.print_exception(error)
        status, message = _verdict(error, arguments[0])
        print(f"headwise: {in_a_line(message)}", file=sys.stderr)
        raise SystemExit(status) from None


def _verdict(error: BaseException, command: str) -> tuple[int, object]:
    """The status that a command ends with, and what it says."""
    if isinstance(error, KeyboardInterrupt):
        resume = "; once there is a run, the same command with --resume goes on with it"
        return 130, "interrupted" + resume * (command in _RESUMABLE)
    if isinstance(error, ValueError):
        return 2, error
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        said = str(error) or type(error).__name__
        return 1, f"there is not enough memory ({said})"
    if isinstance(error, HeadwiseError | FloatingPointError | OSError | SafetensorError):
        return 1, error
    where = f"the same command with {_DEBUG} shows where"
    return _BUG, f"this is a bug in headwise: {reason(error)}; {where}"


def _run(command: str, *rest: str) -> None:
    for number, argument in enumerate((command, *rest), start=1):
        if not is_text(argument):
            raise ValueError(f"argument {number} is {argument!r}, which is no UTF-8 text")
    if command in ("-h", "--help"):
        print(_USAGE, end="")
    elif command == "--version":
        from headwise import __version__

        print(f"headwise {__version__}")
    else:
        look_up("command", command, _COMMANDS)(list(rest))


def _train(argv: list[str]) -> None:
    from headwise.recipes import RECIPES

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise train RECIPE [OPTIONS]\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:14}{recipe.__doc__}")
        print("\nheadwise train RECIPE --help lists the fields of a recipe.")
        return
    name, *fields = argv
    default = look_up("recipe", name, RECIPES)()
    run = parsed(type(default), fields, f"headwise train {name}", default)
    from headwise.recipes.train import train

    _quiet_transformers()
    train(run)


def _experiment(argv: list[str]) -> None:
    from headwise.recipes.experiment import SCALES
    from headwise.recipes.studies import STUDIES
    from headwise.recipes.train import train

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise experiment NAME [--scale SCALE] [OPTIONS]\n")
        for name, study in STUDIES.items():
            print(f"  {name:21}{study.question}")
        print()
        for scale, make in SCALES.items():
            print(f"  --scale {scale:13}{(make.__doc__ or '').splitlines()[0]}")
        print("\nheadwise experiment NAME --help lists the fields of a study.")
        return
    name, *fields = argv
    look_up("study", name, STUDIES)
    scale, fields = first_field("scale", "tiny", fields)
    default = look_up("scale", scale, SCALES)(name)
    run = parsed(type(default), fields, f"headwise experiment {name}", default)
    _quiet_transformers()
    train(run)


def _convert(argv: list[str]) -> None:
    from headwise.recipes.conversion import ConversionRun, convert_directory

    run = parsed(ConversionRun, argv, "headwise convert")
    _quiet_transformers()
    convert_directory(run)


def _tune(argv: list[str]) -> None:
    from headwise.recipes.tune import tune
    from headwise.recipes.tuning import SCHEDULES, TuningRun

    chosen, fields = first_field("schedule", "small", argv)
    default = look_up("schedule", chosen, SCHEDULES)(tyro.MISSING, tyro.MISSING)
    run = parsed(TuningRun, fields, "headwise tune", default)
    _quiet_transformers()
    tune(run)


def _samples(argv: list[str]) -> None:
    from headwise.recipes.samples import SamplesRun, write_samples

    run = parsed(SamplesRun, argv, "headwise samples")
    _quiet_transformers()
    write_samples(run)


def _sample(argv: list[str]) -> None:
    from headwise.recipes.dit_sampling import SampleRun, sample

    run = parsed(SampleRun, argv, "headwise sample")
    _quiet_transformers()
    sample(run)


def _generate(argv: list[str]) -> None:
    called(generate, argv, "headwise generate")


def generate(
    directory: Annotated[Path, tyro.conf.Positional],
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> None:
    """Continue a text with a saved model.

    Args:
        directory: Directory of the model, for example runs/lm/models/moh-seed0.
        prompt: The text to continue.
        max_new_tokens: How many tokens to write; without it 100, or fewer where the model ends.
        temperature: Temperature of the sampling; 0 takes the likeliest token each time.
        seed: Seed of the sampling.
    """
    from headwise.recipes.generation import continue_text, load_model

    _quiet_transformers()
    model, tokenizer = load_model(directory)
    text = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    print(text)


def _report(argv: list[str]) -> None:
    called(report, argv, "headwise report")


def report(directory: Annotated[Path, tyro.conf.Positional]) -> None:
    """Draw the page of a finished run again, from its record.json.

    Args:
        directory: Directory of the run, for example runs/lm.
    """
    from headwise.analysis.records import from_json
    from headwise.analysis.report import render_report, write_page

    file = directory / "record.json"
    if not file.is_file():
        raise ValueError(f"{directory} holds no finished run (no record.json)")
    # Values that do not fit are found out as they are drawn.
    with reading(file):
        page = render_report(from_json(file.read_text()))
    print(write_page(page, directory / "report.html"))


def _eval(argv: list[str]) -> None:
    from headwise.recipes.scoring import EvalRun, score_models

    run = parsed(EvalRun, argv, "headwise eval")
    _quiet_transformers()
    # The harness warns of what is meant here: a model that is loaded, documents of one's own.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    score_models(run)


def _parity(argv: list[str]) -> None:
    from headwise.recipes.parity_table import ParityRun, print_parity

    print_parity(parsed(ParityRun, argv, "headwise parity"))


def _bench(argv: list[str]) -> None:
    from headwise.bench import BENCHMARKS, BenchRun, bench

    names = {name: name for name in ("all", *BENCHMARKS)}
    # The kind of benchmark may come first, without the name of its field.
    if argv and not argv[0].startswith("-"):
        argv = ["--which", look_up("benchmark", argv[0], names), *argv[1:]]
    bench(parsed(BenchRun, argv, "headwise bench"))


def _compile(argv: list[str]) -> None:
    called(compile_kernels, argv, "headwise compile")


def compile_kernels() -> None:
    """Build the CPU kernels for this machine: once, needs a C++ compiler and ninja."""
    from headwise.ops import native
    from headwise.ops.native.build import build
    from headwise.ops.native.kernel_file import NoKernelsError

    if native.is_built():
        print(f"built already: {native.library()}")
        return
    try:
        print(build(say=partial(print, flush=True)))
    except (RuntimeError, OSError) as error:
        raise NoKernelsError(
            f"cannot build the kernels: {error}; everything works without, more slowly"
        ) from error


def _env(argv: list[str]) -> None:
    called(env, argv, "headwise env")


def env(json: bool = False) -> None:
    """Say what there is on this machine, and what would make it faster: for reports of bugs.

    Args:
        json: Print it as JSON.
    """
    import dataclasses
    from json import dumps

    from headwise.environment import environment, faster, in_words

    here = environment()
    if json:
        print(dumps({**dataclasses.asdict(here), "faster": faster(here)}, indent=1))
    else:
        print(in_words(here))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "experiment": _experiment,
    "convert": _convert,
    "tune": _tune,
    "samples": _samples,
    "generate": _generate,
    "sample": _sample,
    "report": _report,
    "eval": _eval,
    "parity": _parity,
    "bench": _bench,
    "compile": _compile,
    "env": _env,
}


def _quiet_transformers() -> None:
    """Its bars for reading and writing files would break up ours."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    # Without a network it retries, and says so each time.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _stdout_is_unread() -> bool:
    """Whether stdout is a pipe whose reader, such as head, has read enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))
