"""A value measured several times, as text."""

import statistics
from collections.abc import Sequence


def with_spread(values: Sequence[float], form: str, spread_form: str | None = None) -> str:
    """The mean ± the standard deviation, such as "1.50 ± 0.02"; equal values have no spread.

    Args:
        values: What was measured; "–" if nothing was.
        form: Format of the mean, such as "{:.2f}".
        spread_form: Format of the deviation. Default: the mean's.
    """
    if not values:
        return "–"
    mean = form.format(statistics.fmean(values))
    if min(values) == max(values):
        return mean
    return f"{mean} ± {(spread_form or form).format(statistics.stdev(values))}"
