"""`headwise report`: the page of a finished run, drawn again."""

from pathlib import Path
from typing import Annotated

import tyro

from headwise.analysis.records import from_json
from headwise.errors import reading
from headwise.parsing import called

# What else a directory is that has such a file.
_INSTEAD = {
    "recovery.png": "; it is of `headwise tune`, which draws no page: see recovery.png",
    "run.json": "; the run in it has not ended, and its command with --resume goes on with it",
    "config.json": "; it is a model's: give the directory of the run, in which models/ lies",
}


def main(argv: list[str]) -> None:
    """Run the command."""
    called(report, argv, "headwise report")


def report(directory: Annotated[Path, tyro.conf.Positional]) -> None:
    """Draw the page of a finished run again, from its record.json.

    Args:
        directory: Directory of the run, for example runs/lm.
    """
    # Imported here: it brings matplotlib, and help works without it.
    from headwise.analysis.report import render_report, write_page

    if not directory.is_dir():
        raise ValueError(f"{directory} holds no finished run: there is no such directory")
    file = directory / "record.json"
    if not file.is_file():
        hint = next((x for name, x in _INSTEAD.items() if (directory / name).exists()), "")
        raise ValueError(f"{directory} holds no finished run (no record.json){hint}")
    # Values that do not fit are found out as they are drawn.
    with reading(file):
        page = render_report(from_json(file.read_text()))
    print(write_page(page, directory / "report.html"))
