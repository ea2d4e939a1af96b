"""Numbers become matplotlib figures."""

from headwise.analysis.plots.curves import (
    final_losses,
    loss_curves,
    mean_curve,
    recovery_curves,
    thinned,
)
from headwise.analysis.plots.loads import (
    CROWDED,
    effective_chart,
    expert_load_chart,
    head_load_chart,
    unused_chart,
)
from headwise.analysis.plots.maps import (
    MANY_DOMAINS,
    head_load_map,
    last_routed_layer,
    patch_maps,
)
from headwise.analysis.plots.panels import Panel, Point, comparison
from headwise.analysis.plots.quality import quality_against_share
from headwise.analysis.plots.scaling import cost_against_size
from headwise.analysis.plots.speed import time_against_share
from headwise.analysis.plots.style import to_svg

__all__ = [
    "CROWDED",
    "MANY_DOMAINS",
    "Panel",
    "Point",
    "comparison",
    "cost_against_size",
    "effective_chart",
    "expert_load_chart",
    "final_losses",
    "head_load_chart",
    "head_load_map",
    "last_routed_layer",
    "loss_curves",
    "mean_curve",
    "patch_maps",
    "quality_against_share",
    "recovery_curves",
    "thinned",
    "time_against_share",
    "to_svg",
    "unused_chart",
]
