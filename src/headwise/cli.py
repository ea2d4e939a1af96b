"""The command `headwise`: parse, call, print."""

import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from safetensors import SafetensorError

from headwise.data.text import is_text
from headwise.errors import HeadwiseError, in_a_line, reason
from headwise.ops.choice import look_up

# A command is the module of its name in headwise.commands, imported when it is called.
_COMMANDS = {
    name: f"headwise.commands.{name.replace('-', '_')}"
    for name in (
        "train", "experiment", "convert", "tune", "write-text", "generate", "serve", "draw",
        "report", "eval", "parity", "compile", "env", "bench",
    )
}  # fmt: skip
_DEBUG = "--debug"
_RESUMABLE = ("train", "experiment", "tune")
_BUG = 70  # EX_SOFTWARE of sysexits.h
_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; `headwise_command`, which comes before, lists them.

    Whatever goes wrong is one line: wrong input with status 2, a failed run with 1, a bug of ours
    with 70. With `--debug` its traceback comes before.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != _DEBUG] or [""]
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
    if command == "--version":
        from headwise import __version__

        print(f"headwise {__version__}")
    else:
        module = import_module(look_up("command", command, _COMMANDS))
        _quiet_transformers()
        module.main(list(rest))


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
