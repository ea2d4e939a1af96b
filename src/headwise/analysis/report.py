"""A record becomes one HTML page that needs nothing else: no network, no other file."""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from headwise.analysis import plots
from headwise.analysis.records import ModelRecord, RunRecord
from headwise.analysis.summary import differences, headline, representatives, tiles
from headwise.analysis.tables import EXPERT_LEGEND, expert_table, speed_table, verdict
from headwise.results.files import write_whole
from headwise.results.html import escaped, printable, table
from headwise.results.table import Table


def write_report(record: RunRecord, path: str | os.PathLike[str]) -> Path:
    """Write the page of a record to `path` and return the path.

    Raises:
        OSError: If the directory is missing or the disk is full.
    """
    return write_page(render_report(record), path)


def write_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Write beside and rename, so that a failure leaves an older page whole.

    Raises:
        OSError: If the directory is missing or the disk is full.
    """
    path = Path(path)
    # A lone surrogate, which a broken tokenizer can produce, becomes "?".
    content = page.encode("utf-8", errors="replace")
    write_whole(path, lambda partial: partial.write_bytes(content))
    return path


def render_report(record: RunRecord) -> str:
    """The page as text, escaped throughout; the same record gives the same page."""
    sections = (
        _table(record),
        _speed(record),
        _drawn(record),
        _losses(record),
        _viewer(record),
        _head_loads(record),
        _patch_maps(record),
        _expert_use(record),
        _expert_loads(record),
        _sample(record),
        _facts(record),
    )
    return Template(_resource("report.html")).substitute(
        title=escaped(record.title),
        headline=escaped(headline(record)),
        tiles="".join(
            f"<div><dt>{escaped(tile.caption)}</dt><dd>{escaped(tile.value)}</dd></div>"
            for tile in tiles(record)
        ),
        sections="\n".join(section for section in sections if section),
        passages=_passages(record),
        css=_resource("report.css"),
        js=_resource("report.js"),
    )


def _table(record: RunRecord) -> str:
    if not record.table_rows:
        return ""
    shown = Table(record.table_columns, record.table_rows)
    legend = (
        "<p class='note'>Bold: the best of a column marked ↓ or ↑, and every value within the "
        "column's largest ± of it.</p>"
        if shown.best()
        else ""
    )
    body = table("Comparison", shown)
    return _section("Comparison", "", body + legend + _sentences(record.notes))


def _speed(record: RunRecord) -> str:
    if not record.speed_note:
        return ""
    body = ""
    if record.speeds:
        body = table("Speed", speed_table(record.speeds)) + _sentences([verdict(record.speeds)])
    return _section("Speed at long contexts", escaped(record.speed_note), body)


def _drawn(record: RunRecord) -> str:
    """The images that each model drew, from the same noise, side by side."""
    grids = []
    for model in representatives(record):
        if model.samples:
            names = "".join(f"<li>{escaped(name)}</li>" for name in model.samples.rows)
            alt = escaped(f"Images that {model.label} drew, a row a class")
            grids.append(
                f'<div>{_heading(model)}<figure class="drawn"><ol>{names}</ol>'
                f'<img alt="{alt}" src="data:image/png;base64,{model.samples.png}"></figure></div>'
            )
    intro = "A row for each class. All models start from the same noise."
    body = f'<div class="charts pair">{"".join(grids)}</div>'
    return _section("What they draw", intro, body) if grids else ""


def _losses(record: RunRecord) -> str:
    if not any(model.training.losses or model.validation.losses for model in record.models):
        return ""
    drawn = [plots.loss_curves(record)]
    if any(model.validation.losses for model in record.models):
        drawn.append(plots.final_losses(record))
    intro = (
        "Thin lines are the training loss, with balance losses where heads or experts are "
        "routed; markers are the validation loss without them; both are averaged over the "
        "seeds of a variant; a band is their range. The other chart shows every run by itself."
    )
    return _section("Losses", intro, _charts("losses", drawn, "pair"))


def _viewer(record: RunRecord) -> str:
    if not any(model.texts for model in record.models):
        return ""
    intro = (
        "Pick a layer and a head: the tokens for which that head is on light up. Point at a token, "
        "or move with the arrow keys, to see all of its heads. Bars on the buttons give the share "
        "of each passage's tokens."
    )
    body = (
        '<div id="viewer"><noscript>This part needs JavaScript; the charts below do not.</noscript>'
        "</div>"
    )
    return _section("Which heads light up", intro, body)


def _head_loads(record: RunRecord) -> str:
    groups: list[str] = []
    for model in representatives(record):
        heads = model.heads
        if heads is None or not heads.by_domain:
            continue
        name = f"heads{len(groups)}"
        # Of classes, or of many domains: the last layer that routes, and all layers.
        if model.images or len(heads.by_domain) > plots.MANY_DOMAINS:
            if (last := plots.last_routed_layer(heads)) is not None:
                maps = [plots.head_load_map(heads, layer) for layer in (last, None)]
                found = _heads_differ(record, model)
                groups.append(_heading(model) + found + _charts(name, maps, "wide"))
            continue
        loads = next(iter(heads.by_domain.values()))
        drawn = [plots.head_load_chart(heads, layer) for layer in range(len(loads))]
        found = _heads_differ(record, model)
        groups.append(_load_charts(name, model, found, drawn, loads))
    intro = (
        "How often each routed head is on, over whole evaluation sets. The more the marks of a "
        "head, or the colours of its column, differ, the more it depends on the domain, or the "
        "class. Shared heads are always on and left out."
    )
    return _section("Load of the routed heads", intro, "".join(groups)) if groups else ""


def _heads_differ(record: RunRecord, model: ModelRecord) -> str:
    """Whether the heads of a variant work for other domains, or classes, beyond chance."""
    loads = [run.heads for run in record.variants()[model.name] if run.heads]
    tested = [heads.difference for heads in loads if heads.difference]
    unit = "image" if model.images else "document"
    layers = range(len(loads[0].shared_heads))
    return _sentences(differences(tested, layers, candidate="head", unit=unit))


def _experts_differ(record: RunRecord, model: ModelRecord) -> str:
    loads = [run.experts for run in record.variants()[model.name] if run.experts]
    tested = [experts.difference for experts in loads if experts.difference]
    return _sentences(differences(tested, loads[0].layers, candidate="expert", unit="document"))


def _patch_maps(record: RunRecord) -> str:
    """On which patches of some images the routed heads are on."""
    groups: list[str] = []
    for model in representatives(record):
        if not model.images or model.heads is None:
            continue
        maps = range(len(model.images[0].maps))
        drawn = [plots.patch_maps(model.images, i, model.heads) for i in maps]
        groups.append(_heading(model) + _charts(f"patches{len(groups)}", drawn, "pair"))
    intro = (
        "The same held-out images once for each routed head, blue where the head is off; for each "
        "size of patches in the last layer that routes."
    )
    return _section("Which patches switch a head on", intro, "".join(groups)) if groups else ""


def _expert_use(record: RunRecord) -> str:
    shown = expert_table(record)
    if not shown.rows:
        return ""
    body = table("Use of the experts", shown)
    chart = _charts("effective", [plots.effective_chart(record)], "single")
    intro = (
        "Means over layers, domains and seeds, on the held-out texts. They do not say whether a "
        "model is good; the losses above do."
    )
    return _section("How the experts are used", intro, body + _sentences(EXPERT_LEGEND) + chart)


def _expert_loads(record: RunRecord) -> str:
    groups: list[str] = []
    shown = {}
    for model in representatives(record):
        if model.experts is None or not model.experts.by_domain:
            continue
        shown[model.label] = model.experts
        loads = next(iter(model.experts.by_domain.values()))
        drawn = [plots.expert_load_chart(model.experts, layer) for layer in range(len(loads))]
        found = _experts_differ(record, model)
        groups.append(_load_charts(f"experts{len(groups)}", model, found, drawn, loads))
    if not groups:
        return ""
    unused = _charts("unused", [plots.unused_chart(shown)], "single")
    intro = (
        "How the work spreads over the experts, the busiest first; the dashed line is a perfectly "
        "even load."
    )
    return _section(
        "Load of the experts", intro, "".join(groups) + f"<h3>Idle experts</h3>{unused}"
    )


def _sample(record: RunRecord) -> str:
    if not record.sample_text:
        return ""
    body = (
        f'<pre class="sample"><span class="prompt">{escaped(record.sample_prompt)}</span>'
        f"{escaped(record.sample_text)}</pre>"
    )
    who = f"Written by {escaped(record.sample_model)}; the prompt is underlined."
    return _section("A sample", who, body)


def _facts(record: RunRecord) -> str:
    rows = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in record.facts.items()
    )
    return _section("How it was run", "", f'<dl class="facts">{rows}</dl>') if rows else ""


def _passages(record: RunRecord) -> str:
    """What the viewer shows, as JSON that cannot end its script element.

    Tokens share few combinations of heads. Each stands once, in `sets`, and a token names its place
    there: [[0, 1], [0, 2], [0, 1]] is the sets [[0, 1], [0, 2]] and the places [0, 1, 0].
    """
    models: list[dict[str, Any]] = []
    for model in record.models:
        if model.texts and model.heads:
            loads = next(iter(model.heads.by_domain.values()))
            places: dict[tuple[int, ...], int] = {}
            texts = [
                {
                    "domain": text.domain,
                    "tokens": [printable(token) for token in text.tokens],
                    "on": [
                        [places.setdefault(tuple(heads), len(places)) for heads in layer]
                        for layer in text.heads_on
                    ],
                }
                for text in model.texts
            ]
            models.append(
                {
                    "label": f"{model.label}, seed {model.seed}",
                    "shared": model.heads.shared_heads,
                    "heads": [len(layer) for layer in loads],
                    "sets": list(places),
                    "texts": texts,
                }
            )
    return json.dumps(models, separators=(",", ":")).replace("<", "\\u003c")


def _load_charts(
    name: str, model: ModelRecord, found: str, figures: list[Any], loads: list[list[float]]
) -> str:
    """Figures of a model's layers, under what was found; `found` is HTML."""
    crowded = max(map(len, loads), default=0) > plots.CROWDED
    return _heading(model) + found + _charts(name, figures, "pair" if crowded else "grid")


def _heading(model: ModelRecord) -> str:
    return f"<h3>{escaped(model.label)} <small>seed {model.seed}</small></h3>"


def _section(title: str, intro: str, body: str) -> str:
    """A part of the page with its heading; title, intro and body are HTML."""
    paragraph = f'<p class="intro">{intro}</p>' if intro else ""
    return f"<section><h2>{title}</h2>{paragraph}{body}</section>"


def _charts(name: str, figures: Sequence[Any], layout: str) -> str:
    """Figures, under a name that no others of the page have, as the style sheet lays them out."""
    drawn = (plots.to_svg(figure, f"{name}-{index}") for index, figure in enumerate(figures))
    return f'<div class="charts {layout}">{"".join(f"<figure>{x}</figure>" for x in drawn)}</div>'


def _sentences(notes: Sequence[str]) -> str:
    """A list of sentences."""
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _resource(name: str) -> str:
    return files("headwise.analysis").joinpath(name).read_text(encoding="utf-8")
