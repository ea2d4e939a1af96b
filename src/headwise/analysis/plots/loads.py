"""How often heads are on, and how much of the work each expert gets."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwise.analysis.experts import expert_use
from headwise.analysis.measure import unused_share
from headwise.analysis.plots.style import (
    DASHES,
    DOMAINS,
    INK,
    MARKERS,
    MUTED,
    VARIANTS,
    band,
    cycle,
    legend,
    mean,
    name_rows,
    new_figure,
    percent,
    styled,
)
from headwise.analysis.records import ExpertLoads, HeadLoads, RunRecord

# Above so many heads or experts a load chart is drawn wide.
CROWDED = 16


@styled
def head_load_chart(heads: HeadLoads, layer: int) -> Figure:
    """How often each routed head of a layer is on, domains side by side.

    The dashed line is the balanced level, where every routed head is on equally often.
    """
    loads = {domain: heads.routed(domain, layer) for domain in heads.by_domain}
    positions = heads.routed_heads(layer)
    figure, axes = new_figure(4.6 if len(positions) > CROWDED else 3.5, 2.9)
    balanced = mean([value for load in loads.values() for value in load])
    _compare(axes, positions, loads, balanced)
    axes.set(ylim=(0, 1.06), title=f"Layer {layer}")
    axes.set(xlabel="Routed head (index)", ylabel="On for (% of tokens)")
    legend(axes)
    return figure


@styled
def expert_load_chart(experts: ExpertLoads, position: int) -> Figure:
    """Share of the assignments that each expert of a layer gets, the busiest expert first.

    Experts are ordered by their mean over the domains, so that a rank is one expert.
    """
    loads = {domain: layers[position] for domain, layers in experts.by_domain.items()}
    means = [mean(values) for values in zip(*loads.values(), strict=True)]
    order = sorted(range(len(means)), key=lambda expert: -means[expert])
    ordered = {domain: [load[expert] for expert in order] for domain, load in loads.items()}
    figure, axes = new_figure(4.6 if len(order) > CROWDED else 3.5, 2.9)
    _compare(axes, list(range(1, len(order) + 1)), ordered, 1 / max(len(order), 1))
    highest = max(
        (load for layers in experts.by_domain.values() for layer in layers for load in layer),
        default=1,
    )
    axes.set_ylim(-0.03 * highest, highest * 1.1 or 1)
    axes.set_title(f"Layer {experts.layers[position]}")
    axes.set(xlabel=f"Rank among {len(order)} experts", ylabel="Load (% of assignments)")
    legend(axes)
    return figure


@styled
def effective_chart(record: RunRecord) -> Figure:
    """Effective share of a layer's experts against the layer, in the variants' colours.

    The mean over domains and seeds; the band is the range over seeds.
    """
    figure, axes = new_figure(4.6, 3.2)
    layers: set[int] = set()
    for index, runs in enumerate(record.variants().values()):
        shares = [_effective_shares(run.experts) for run in runs if run.experts]
        if not shares:
            continue
        layers.update(drawn := sorted(shares[0]))
        band(
            axes,
            drawn,
            [[share[layer] for share in shares] for layer in drawn],
            color=cycle(VARIANTS, index),
            linestyle=cycle(DASHES, index),
            marker=cycle(MARKERS, index),
            markersize=6.5,
            label=runs[0].label,
        )
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_formatter(percent)
    axes.set_xticks(sorted(layers))
    axes.margins(x=0.12)
    axes.set(title="Effective experts", xlabel="Layer (index)")
    axes.set_ylabel("Share of the layer's experts (%)")
    legend(axes)
    return figure


@styled
def unused_chart(models: Mapping[str, ExpertLoads]) -> Figure:
    """Share of the experts that got no assignment at all, for each model, layer and domain."""
    rows = [
        (f"{label} · layer {layer}", experts, position)
        for label, experts in models.items()
        for position, layer in enumerate(experts.layers)
    ]
    domains = list(dict.fromkeys(d for experts in models.values() for d in experts.by_domain))
    figure, axes = new_figure(4.6, 1.4 + 0.34 * len(rows))
    thickness = 0.7 / max(len(domains), 1)
    largest = 0.08
    for index, domain in enumerate(domains):
        drawn = [row for row, (_, experts, _) in enumerate(rows) if domain in experts.by_domain]
        shares = [unused_share(rows[row][1].by_domain[domain][rows[row][2]]) for row in drawn]
        largest = max(largest, *shares)
        offset = (index - (len(domains) - 1) / 2) * thickness
        bars = axes.barh(
            [row + offset for row in drawn],
            shares,
            height=thickness * 0.85,
            color=cycle(DOMAINS, index),
            hatch=cycle(("", "///", "...", "xx"), index),
            edgecolor="white",
            linewidth=0,
            label=domain,
        )
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=8)
    name_rows(axes, [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.08, 1.25 * largest))
    axes.xaxis.set_major_formatter(percent)
    axes.set(title="Experts never used", ylabel="Model and layer")
    axes.set_xlabel("Share of the layer's experts (%)")
    legend(axes)
    return figure


def _effective_shares(experts: ExpertLoads) -> dict[int, float]:
    """By layer, the mean over the domains."""
    shares: dict[int, list[float]] = {layer: [] for layer in experts.layers}
    for use in expert_use(experts):
        shares[use.layer].append(use.effective / use.experts)
    return {layer: mean(values) for layer, values in shares.items()}


def _compare(
    axes: Axes, positions: list[int], loads: Mapping[str, Sequence[float]], balanced: float
) -> None:
    """Dots for each domain; the line between them is as long as the domains differ."""
    columns = list(zip(*loads.values(), strict=True))
    axes.vlines(
        positions,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=MUTED,
        linewidth=1.2,
        alpha=0.6,
    )
    size = 6.5 if len(positions) <= CROWDED else 4
    for index, (domain, load) in enumerate(loads.items()):
        axes.plot(
            positions,
            load,
            linestyle="none",
            marker=cycle(MARKERS, index),
            markersize=size,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            color=cycle(DOMAINS, index),
            label=domain,
        )
    axes.axhline(balanced, color=INK, linestyle="--", linewidth=1, label="balanced")
    axes.yaxis.set_major_formatter(percent)
    axes.set_xticks(positions[:: max(1, -(-len(positions) // 12))])
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.08 if len(positions) <= CROWDED else 0.02)
