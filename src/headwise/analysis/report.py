"""A record becomes one HTML page that needs nothing else: no network, no other file."""

import json
import os
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from headwise.analysis import plots
from headwise.analysis.records import ModelRecord, RunRecord
from headwise.analysis.summary import best_cells, headline, representatives, tiles


def write_report(record: RunRecord, path: str | os.PathLike[str]) -> Path:
    """Write the page of a record to `path` and return the path.

    It is written beside and renamed, so that a failure leaves an older page whole.

    Raises:
        OSError: If the directory is missing or the disk is full.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    page = render_report(record)
    try:
        # A lone surrogate, which a broken tokenizer can produce, becomes "?".
        beside.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def render_report(record: RunRecord) -> str:
    """The page as text, escaped throughout; the same record gives the same page."""
    sections = (
        _table(record),
        _losses(record),
        _viewer(record),
        _head_loads(record),
        _expert_loads(record),
        _sample(record),
        _facts(record),
    )
    return Template(_resource("report.html")).substitute(
        title=_text(record.title),
        headline=_text(headline(record)),
        tiles="".join(
            f"<div><dt>{_text(tile.caption)}</dt><dd>{_text(tile.value)}</dd></div>"
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
    best = best_cells(record.table_columns, record.table_rows)
    # An arrow stays on the line of the word before it.
    columns = [
        re.sub(r"\s+([↓↑])$", "\N{NO-BREAK SPACE}\\1", name) for name in record.table_columns
    ]
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    rows = []
    for r, row in enumerate(record.table_rows):
        cells = [f'<th scope="row">{_text(row[0])}</th>'] if row else []
        for c, cell in enumerate(row[1:], start=1):
            text = _text(cell)
            cells.append(
                f"<td><strong>{text}</strong></td>" if (r, c) in best else f"<td>{text}</td>"
            )
        rows.append("<tr>" + "".join(cells) + "</tr>")
    legend = (
        "<p class='note'>Bold: the best of a column marked ↓ or ↑, and every value within the "
        "column's largest ± of it.</p>"
        if best
        else ""
    )
    body = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison, scrolls sideways">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{legend}"
    )
    return _section("Comparison", "", body + _notes(record.notes))


def _losses(record: RunRecord) -> str:
    if not any(model.training.losses or model.validation.losses for model in record.models):
        return ""
    charts = [("loss", plots.loss_curves(record))]
    if any(model.validation.losses for model in record.models):
        charts.append(("final", plots.final_losses(record)))
    intro = (
        "Thin lines are the training loss and markers the validation loss, averaged over the "
        "seeds of a variant; a band is their range. The other chart shows every run by itself."
    )
    return _section("Losses", intro, _charts(charts, "pair"))


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
        if model.heads is None or not model.heads.by_domain:
            continue
        loads = next(iter(model.heads.by_domain.values()))
        charts = [plots.head_load_chart(model.heads, layer) for layer in range(len(loads))]
        groups.append(_load_charts(f"heads{len(groups)}", model, charts, loads))
    intro = (
        "How often each routed head is on, over whole evaluation texts. The longer the line "
        "between two marks, the more the domains differ. Shared heads are always on and left out."
    )
    return _section("Load of the routed heads", intro, "".join(groups)) if groups else ""


def _expert_loads(record: RunRecord) -> str:
    groups: list[str] = []
    shown = {}
    for model in representatives(record):
        if model.experts is None or not model.experts.by_domain:
            continue
        shown[model.label] = model.experts
        loads = next(iter(model.experts.by_domain.values()))
        charts = [plots.expert_load_chart(model.experts, layer) for layer in range(len(loads))]
        groups.append(_load_charts(f"experts{len(groups)}", model, charts, loads))
    if not groups:
        return ""
    unused = _charts([("unused", plots.unused_chart(shown))], "single")
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
        f'<pre class="sample"><span class="prompt">{_text(record.sample_prompt)}</span>'
        f"{_text(record.sample_text)}</pre>"
    )
    who = f"Written by {_text(record.sample_model)}; the prompt is underlined."
    return _section("A sample", who, body)


def _facts(record: RunRecord) -> str:
    rows = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in record.facts.items()
    )
    return _section("How it was run", "", f'<dl class="facts">{rows}</dl>') if rows else ""


def _passages(record: RunRecord) -> str:
    """What the viewer shows, as JSON that cannot end its script element."""
    models: list[dict[str, Any]] = []
    for model in record.models:
        if model.texts and model.heads:
            loads = next(iter(model.heads.by_domain.values()))
            models.append(
                {
                    "label": f"{model.label}, seed {model.seed}",
                    "shared": model.heads.shared_heads,
                    "heads": [len(layer) for layer in loads],
                    "texts": [
                        {
                            "domain": text.domain,
                            "tokens": [_printable(token) for token in text.tokens],
                            "on": text.heads_on,
                        }
                        for text in model.texts
                    ],
                }
            )
    return json.dumps(models, separators=(",", ":")).replace("<", "\\u003c")


def _section(title: str, intro: str, body: str) -> str:
    paragraph = f'<p class="intro">{intro}</p>' if intro else ""
    return f"<section><h2>{title}</h2>{paragraph}{body}</section>"


def _charts(charts: Iterable[tuple[str, Any]], layout: str) -> str:
    figures = (f"<figure>{plots.to_svg(figure, name)}</figure>" for name, figure in charts)
    return f'<div class="charts {layout}">{"".join(figures)}</div>'


def _load_charts(
    name: str, model: ModelRecord, figures: list[Any], loads: list[list[float]]
) -> str:
    heading = f"<h3>{_text(model.label)} <small>seed {model.seed}</small></h3>"
    charts = [(f"{name}-{index}", figure) for index, figure in enumerate(figures)]
    crowded = max(map(len, loads), default=0) > plots.CROWDED
    return heading + _charts(charts, "pair" if crowded else "grid")


def _notes(notes: list[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _text(text: str) -> str:
    return escape(_printable(text))


def _printable(text: str) -> str:
    """Control characters other than tab and line feed as their pictures (␀, ␛)."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else "␡" if c == "\x7f" else c
        for c in text
    )


def _resource(name: str) -> str:
    return files("headwise.analysis").joinpath(name).read_text(encoding="utf-8")
