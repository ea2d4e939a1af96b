"""What the page shows of image models: what they drew, and the heads of classes and patches."""

from headwise.analysis import plots
from headwise.analysis.elements import charts, model_heading, section
from headwise.analysis.image_records import SampleGrid
from headwise.analysis.records import HeadLoads, ModelRecord, RunRecord
from headwise.analysis.summary import representatives
from headwise.results.html import escaped


def samples(record: RunRecord) -> str:
    """The images that each model drew, from the same noise, side by side."""
    drawn = [(model, model.samples) for model in representatives(record) if model.samples]
    if not drawn:
        return ""
    grids = (model_heading(model) + _grid(model, samples) for model, samples in drawn)
    intro = "A row for each class. All models start from the same noise."
    body = "".join(f"<div>{grid}</div>" for grid in grids)
    return section("What they draw", intro, f'<div class="charts pair">{body}</div>')


def _grid(model: ModelRecord, samples: SampleGrid) -> str:
    names = "".join(f"<li>{escaped(name)}</li>" for name in samples.rows)
    alt = f"Images that {model.label} drew, a row a class"
    return (
        f'<figure class="drawn"><ol>{names}</ol>'
        f'<img alt="{escaped(alt)}" src="data:image/png;base64,{samples.png}"></figure>'
    )


def are_mapped(model: ModelRecord) -> bool:
    """Whether the domains are classes, or so many that their loads are drawn as maps."""
    heads = model.heads
    return heads is not None and bool(model.images or len(heads.by_domain) > plots.MANY_DOMAINS)


def load_maps(name: str, model: ModelRecord, heads: HeadLoads) -> str:
    """How often the heads of the last layer that routes, and of all layers, are on."""
    if (last := plots.last_routed_layer(heads)) is None:
        return ""
    drawn = [(f"{name}-{i}", plots.head_load_map(heads, at)) for i, at in enumerate((last, None))]
    return model_heading(model) + charts(drawn, "wide")


def patch_maps(record: RunRecord) -> str:
    """On which patches of some images the routed heads are on."""
    groups: list[str] = []
    for model in representatives(record):
        if not model.images or model.heads is None:
            continue
        drawn = [
            (f"patches{len(groups)}-{i}", plots.patch_maps(model.images, i, model.heads))
            for i in range(len(model.images[0].maps))
        ]
        groups.append(model_heading(model) + charts(drawn, "pair"))
    intro = (
        "The same held-out images once for each routed head, blue where the head is off; for each "
        "size of patches in the last layer that routes."
    )
    return section("Which patches switch a head on", intro, "".join(groups)) if groups else ""
