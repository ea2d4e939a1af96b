"""From routings to numbers, from numbers to figures, from figures to one HTML page.

`measure` and `experts` count, `records` keep what was counted. Only `plots`, which `report` uses,
need matplotlib.
"""
