"""The script `headwise`: says what needs no torch before torch takes its seconds to load.

That is the list of commands, and that a directory is missing.

It lies beside the package, for nothing in the package can run before `import headwise`, which
registers what transformers' AutoModel needs.
"""

import gc
import os
import sys
from pathlib import Path

USAGE = """usage: headwise COMMAND [OPTIONS]

  train RECIPE   train models and compare them        headwise train lm --help
  experiment X   repeat a study of the papers         headwise experiment --help
  convert PATH   route the heads of a model           headwise convert --help
  tune DIR       train a converted model further      headwise tune --help
  write-text DIR let a model write text to tune on    headwise write-text --help
  generate DIR   continue a text with a saved model   headwise generate --help
  serve DIR      answer OpenAI's clients with it      headwise serve --help
  draw DIR       draw images with a trained DiT       headwise draw --help
  report DIR     draw a run's page again              headwise report --help
  eval DIR …     score models on tasks or on images   headwise eval --help
  parity         MH-MoE at a sparse MoE's cost        headwise parity --help
  compile        build the CPU kernels, once          headwise compile
  env            what is installed here, and missing  headwise env
  bench          measure speed on this machine        headwise bench --help

--debug, anywhere, shows the traceback of a command that fails.
"""

# Commands whose first argument is a directory, never a name on a hub, and what they say of one that
# is missing; the same as the commands themselves say.
_MISSING = {
    "generate": "{} holds no model: there is no such directory",
    "serve": "{} holds no model: there is no such directory",
    "draw": "{} holds no model: there is no such directory",
    "report": "{} holds no finished run: there is no such directory",
}


def main() -> None:
    """Run the command line, list the commands, or end with status 2 where a directory is missing.

    Ctrl-C is a line and status 130 while libraries are loaded, too, which takes seconds.
    """
    command, path, *_ = [*(x for x in sys.argv[1:] if x != "--debug"), "--help", ""]
    if command in ("-h", "--help"):
        try:
            print(USAGE, end="", flush=True)
        except BrokenPipeError:
            # Python would flush again at its end, and say that it cannot.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Options may come before the directory, or a name be none that a line can show, or a traceback
    # be wanted; then the command finds out by itself.
    plain = path.isprintable() and not path.startswith("-") and "--debug" not in sys.argv
    if command in _MISSING and path and plain and not os.path.exists(path):
        print(f"headwise: {_MISSING[command].format(Path(path))}", file=sys.stderr)
        raise SystemExit(2)
    # Python looks for garbage among all that there is whenever much was made, and again at its end.
    # What is imported is none; looking there takes a third of the time to load it.
    gc.disable()
    try:
        from headwise.cli import main as run
    except KeyboardInterrupt:
        print("headwise: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    gc.freeze()
    gc.enable()
    run()
