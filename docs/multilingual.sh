#!/usr/bin/env bash
# Real text in eight languages for `headwise train lm --data DIR`: LibreOffice's help, page by page.
#
#     bash docs/multilingual.sh DIR
#
# It needs apt-get and dpkg-deb (Debian, Ubuntu), python3, and no rights: nothing is installed.
# DIR gets a directory for each language, with the same pages under the same names, about 2 MB each.
# headwise holds out the same names in every language, so that no translation of a page that a model
# is validated with is trained on. Paragraphs that a page repeats from another, that were left in
# English, and programs are left out. Run again, it writes the same. Licence of the text: MPL 2.0.
set -euo pipefail

readonly LANGUAGES=(en-us de es fr ja ko ru zh-cn)

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
mkdir -p "$1"
target=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
for language in "${LANGUAGES[@]}"; do
    # As root, apt-get would fetch as another user, who may not write here.
    apt-get -o APT::Sandbox::User=root download --quiet=2 "libreoffice-help-$language"
    dpkg-deb --extract "libreoffice-help-${language}_"*.deb "$language"
done

python3 - "$target" "${LANGUAGES[@]}" <<'PYTHON'
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

target, languages = Path(sys.argv[1]), sys.argv[2:]
PARTS = ("shared", "swriter", "simpress", "sdraw", "smath", "schart")
HIDDEN = {"script", "style", "pre", "footer"}
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "th", "div", "br"}
LEAST = 100  # characters of a page, in every language


class Page(HTMLParser):
    """The paragraphs of a page's own area, without menus and programs."""

    def __init__(self, html):
        super().__init__()
        self.paragraphs, self.piece, self.inside = [], [], False
        self.hidden, self.spans = 0, []
        self.feed(html)
        self.end_paragraph()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in PARAGRAPHS:
            self.end_paragraph()
        self.inside |= tag == "div" and attributes.get("id") == "DisplayArea"
        self.hidden += tag in HIDDEN
        if tag == "span":
            # Of what differs between systems and programs, the page shows one: the default.
            other = "hidden" in attributes and not attributes["id"].startswith("default")
            self.spans.append(other)
            self.hidden += other

    def handle_endtag(self, tag):
        if tag in PARAGRAPHS:
            self.end_paragraph()
        self.hidden -= tag in HIDDEN
        if tag == "span" and self.spans:
            self.hidden -= self.spans.pop()

    def handle_data(self, data):
        if self.inside and not self.hidden:
            self.piece.append(data)

    def end_paragraph(self):
        text = " ".join("".join(self.piece).split())
        self.piece = []
        if text.isprintable() and any(character.isalpha() for character in text):
            self.paragraphs.append(text)


def pages(language, known):
    """Name to text of all pages, of paragraphs that are not known yet."""
    (root,) = Path(language).glob("usr/share/libreoffice/help/*/text")
    result = {}
    for part in PARTS:
        for file in sorted((root / part).rglob("*.html")):
            new = []
            for paragraph in Page(file.read_text("utf-8")).paragraphs:
                if paragraph not in known:
                    known.add(paragraph)
                    new.append(paragraph)
            if new:
                name = "-".join(file.relative_to(root).with_suffix("").parts)
                result[name] = "\n".join(new) + "\n"
    return result


english = set()
texts = {languages[0]: pages(languages[0], english)}
texts |= {language: pages(language, set(english)) for language in languages[1:]}
shared = sorted(set.intersection(*map(set, texts.values())))
shared = [name for name in shared if all(len(text[name]) >= LEAST for text in texts.values())]
for language, text in texts.items():
    directory = target / language.split("-")[0]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in shared:
        (directory / f"{name}.txt").write_text(text[name], "utf-8")
    size = sum(len(text[name].encode()) for name in shared)
    print(f"{directory.name}: {len(shared)} pages, {size / 1e6:.2f} MB")
PYTHON
