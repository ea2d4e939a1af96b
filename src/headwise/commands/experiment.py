"""`headwise experiment`: a study of the papers, at a scale."""

import re
from dataclasses import replace
from pathlib import Path

from headwise.ops.choice import look_up
from headwise.parsing import first_field, parsed
from headwise.recipes import train
from headwise.recipes.scales import SCALES
from headwise.recipes.studies import STUDIES

# Of the project, where the command runs in its folder: what is expected is written there first.
LOG = Path("docs/log.md")


def main(argv: list[str]) -> None:
    """Run the command."""
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
    if LOG.is_file():
        default = replace(default, expected=expectation(name, LOG.read_text("utf-8")))
    run = parsed(type(default), fields, f"headwise experiment {name}", default)
    if LOG.is_file() and not run.expected:
        raise ValueError(
            f"expected is {run.expected!r}, and {LOG} expects nothing of {name}; before it runs, "
            f'write what you expect there, under "Expected:" as "- **{name}**: …", or here'
        )
    if run.expected:
        print(f"Expected: {run.expected}", flush=True)
    train(run)


def expectation(study: str, log: str) -> str:
    """What a log expects of a study: the last of its entries under "Expected:"; empty for none.

    Example: "- **moh-budget**: flat from 100 to 50 % of the heads, then worse."
    """
    lists = re.findall(r"^Expected:\n\n((?:(?:- |  ).*\n)+)", log, re.MULTILINE)
    entry = rf"^- \*\*{re.escape(study)}\*\*: (.*(?:\n  .*)*)"
    found = re.findall(entry, "\n".join(lists), re.MULTILINE)
    return " ".join(found[-1].split()) if found else ""
