"""`headwise env`: what there is on this machine."""

import dataclasses
from json import dumps

from headwise.environment import environment, faster, in_words
from headwise.parsing import called


def main(argv: list[str]) -> None:
    """Run the command."""
    called(env, argv, "headwise env")


def env(json: bool = False) -> None:
    """Say what there is on this machine, and what would make it faster: for reports of bugs.

    Args:
        json: Print it as JSON.
    """
    here = environment()
    if json:
        print(dumps({**dataclasses.asdict(here), "faster": faster(here)}, indent=1))
    else:
        print(in_words(here))
