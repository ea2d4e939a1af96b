"""`headwise tune`: a converted model, trained further."""

import tyro

from headwise.ops.choice import look_up
from headwise.parsing import first_field, parsed
from headwise.recipes.tune import SCHEDULES, TuningRun, tune


def main(argv: list[str]) -> None:
    """Run the command."""
    schedule, fields = first_field("schedule", "small", argv)
    default = look_up("schedule", schedule, SCHEDULES)(tyro.MISSING, tyro.MISSING)
    tune(parsed(TuningRun, fields, "headwise tune", default))
