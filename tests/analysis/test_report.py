import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headwise.analysis.records import Curve, ModelRecord, RunRecord, from_json, to_json
from headwise.analysis.report import render_report, write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps ids, text and what scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.texts, self.scripts, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)


@pytest.fixture
def text(record):
    return render_report(record)


def test_the_page_parses(text):
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert len(page.scripts) == 2


def test_the_page_asks_nobody(text):
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    policy = text[text.index("Content-Security-Policy") :].split(">")[0]
    assert "default-src 'none'" in policy
    sources = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert all(source == "data:," or source.startswith("#") for source in sources)


def test_hostile_text_stays_text(text):
    page = Page(text)
    assert "Title <script>alert('&')</script>" in page.texts
    assert not any("alert" in script for script in page.scripts[1:])
    # In the JSON the token cannot end its script element.
    assert "\\u003cscript>" in page.scripts[0]
    assert "0, 1 <both>" in page.texts
    assert " upon a\n<time>" in page.texts


def test_the_viewer_gets_the_passages(text):
    (model,) = json.loads(Page(text).scripts[0])
    assert (model["label"], model["shared"], model["heads"]) == (
        "MoH $x$, seed 0",
        [[0], [0]],
        [4, 4],
    )
    code, prose = model["texts"]
    assert code["tokens"] == ["\t", "<script>alert('&')</script>", "x", "\n\n  "]
    assert [model["sets"][place] for place in code["on"][0]] == [[0, 1], [0, 2], [0, 3], [0, 2]]
    assert len(model["sets"]) == 3
    # Control characters are shown as pictures.
    assert prose["tokens"] == ["␀", " naïve 蛇"]


def test_the_page_has_its_sections(text):
    texts = Page(text).texts
    for heading in (
        "Comparison",
        "Losses",
        "Which heads light up",
        "Load of the routed heads",
        "How the experts are used",
        "Load of the experts",
        "A sample",
        "How it was run",
    ):
        assert heading in texts
    assert "Once␛" in texts
    assert "<td><strong>1.50 ± 0.03</strong></td><td><strong>1,200 ± 42</strong></td>" in text
    assert "<td><strong>1.49</strong></td><td>900</td>" in text


def test_the_use_of_the_experts_is_a_row_a_model(text):
    part = text[text.index("How the experts are used") : text.index("Load of the experts")]
    # Two of five experts in each domain, equally busy; the domains share one of three. By chance
    # (3 - 1) / 2 · 1/4 · (1/24 + 1/12) / ln 2; sub-tokens that go to two of two experts overlap.
    cells = ["5", "40.0", "40.0", "50.0", "50.0", "100.0", "50.00", "4.51"]
    row = '<tr><th scope="row">MoE</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    assert row in part
    assert part.count("<tr>") == 2
    assert part.count("<svg") == 1


def test_the_page_says_whether_domains_differ_beyond_chance(record, pictures):
    texts = Page(render_report(record)).texts
    for sentence in (
        "The heads differ between the domains beyond chance, over all layers p = 0.0001: 40.0 % of "
        "the variance of loads between documents lies between the domains (0.04 of 0.1), 10.0 % by "
        "chance.",
        "By layer: 0 p = 0.0001, 1 p = 0.0001.",
        "No difference of the experts between the domains is found beyond chance, over all layers "
        "p = 0.3: 40.0 % of the variance of loads between documents lies between the domains (0.04 "
        "of 0.1), 10.0 % by chance.",
        "By layer: 1 p = 0.3.",
    ):
        assert texts.count(sentence) == 1
    # Where it was not tested, nothing is said.
    assert not any("beyond chance" in text for text in Page(render_report(pictures)).texts)


def test_the_same_record_gives_the_same_page(record, text):
    assert render_report(from_json(to_json(record))) == text


def test_a_page_of_nothing():
    page = Page(render_report(RunRecord("t", {}, [], [], [], [])))
    assert page.open == []
    assert "Losses" not in page.texts
    assert "How the experts are used" not in page.texts


def test_a_run_without_validation():
    run = ModelRecord("a", "A", 0, Curve([1, 2], [2.0, 1.0]), Curve([], []))
    text = render_report(RunRecord("t", {}, [], [], [], [run]))
    assert "Validation loss at the end" not in text
    assert "Loss while training" in text


def test_writing_replaces(record, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(record, str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_page(record, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(record, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_broken_characters_are_written(record, tmp_path):
    path = write_report(replace(record, sample_text="a\ud800b"), tmp_path / "report.html")
    assert "a?b" in path.read_text(encoding="utf-8")


def test_numbers_need_no_matplotlib_and_figures_no_pyplot():
    code = (
        "import sys, headwise.analysis.experts; assert 'matplotlib' not in sys.modules;"
        "import headwise.analysis.report; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_of_image_models(pictures):
    text = render_report(pictures)
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for heading in ("What they draw", "Load of the routed heads", "Which patches switch a head on"):
        assert page.texts.count(heading) == 1
    # Few as they are, the classes are mapped.
    assert re.findall(r'aria-label="([^"]*): Class against', text) == ["Layer 0", "All layers"]
    assert text.count(': Routed head (index) against Class of the image"') == 1
    drawn = [value for name, value in page.attributes if name == "src"]
    assert drawn == [f"data:image/png;base64,{pictures.models[1].samples.png}"]
    # Whole beside the samples, cut in the maps.
    assert page.texts.count("<script>alert('&')</script>") == 1
    assert "<script>alert('&')</scr…" in page.texts
    assert len(page.scripts) == 2
    assert not re.search(r"https?://", text)
    assert render_report(from_json(to_json(pictures))) == text
