"""From routings to numbers, from numbers to figures, from figures to one HTML page.

Only `plots` needs matplotlib; it and `report` are imported by name, never from here.
"""

from headwise.analysis.experts import (
    ExpertUse,
    count_overlap,
    effective_experts,
    expert_use,
    specialisation,
    specialisation_by_chance,
)
from headwise.analysis.measure import (
    LoadMeter,
    count_experts,
    count_heads,
    heads_on,
    load_distance,
    load_entropy,
    unused_share,
)
from headwise.analysis.records import (
    Curve,
    ExpertLoads,
    HeadLoads,
    ModelRecord,
    RoutedText,
    RunRecord,
    from_json,
    to_json,
)

__all__ = [
    "Curve",
    "ExpertLoads",
    "ExpertUse",
    "HeadLoads",
    "LoadMeter",
    "ModelRecord",
    "RoutedText",
    "RunRecord",
    "count_experts",
    "count_heads",
    "count_overlap",
    "effective_experts",
    "expert_use",
    "from_json",
    "heads_on",
    "load_distance",
    "load_entropy",
    "specialisation",
    "specialisation_by_chance",
    "to_json",
    "unused_share",
]
