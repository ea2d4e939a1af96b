from headwise.analysis.svg import inline_svg

FILE = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="10pt" height="5pt" viewBox="0 0 10 5"
 xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata>
  <dc:format resource="http://purl.org/x"/>
 </metadata>
 <defs><clipPath id="p"/></defs>
 <use xlink:href="#m" clip-path="url(#p)"/>
</svg>
"""


def test_inline_svg():
    assert inline_svg(FILE, "loss", 'A "<b>"', 300) == (
        '<svg role="img" aria-label="A &quot;&lt;b&gt;&quot;" style="max-width: 300px" '
        'viewBox="0 0 10 5"><defs><clipPath id="loss-p"/></defs>'
        '<use xlink:href="#loss-m" clip-path="url(#loss-p)"/></svg>'
    )


def test_what_shows_nothing_goes():
    file = """<svg viewBox="0 0 10 5">
 <g id="unused">
  <path id="m" d="M 0 208.8
L 43.088521 -2.5
z
" style="fill: none; stroke: #123"/>
  <use href="#m" transform="matrix(0.012345678 0 0 1 0 0)"/>
  <text style="font-size: 10px; font-family: 'A', 'B'; fill: red" x="1"
   transform="rotate(-0 1 2)">0.123456  L 2</text>
 </g>
</svg>"""
    assert inline_svg(file, "a", "", 7).partition(">")[2] == (
        '<g><path id="a-m" d="M0 208.8L43.089 -2.5z" style="fill:none;stroke:#123"/>'
        '<use href="#a-m" transform="matrix(0.012346 0 0 1 0 0)"/>'
        '<text style="font-size:10px;fill:red" x="1">0.123456  L 2</text></g></svg>'
    )


def test_markers_of_one_style_have_it_from_their_group():
    file = """<svg viewBox="0 0 10 5"><path id="m"/>
 <g clip-path="url(#p)"><use href="#m" x="1" style="fill: red"/>
  <use href="#m" x="2" style="fill: red"/></g>
 <g clip-path="url(#p)"><use href="#m" style="fill: red"/><use href="#m" style="fill: blue"/></g>
</svg>"""
    assert inline_svg(file, "a", "", 7).partition("/>")[2] == (
        '<g clip-path="url(#a-p)" style="fill:red"><use href="#a-m" x="1"/>'
        '<use href="#a-m" x="2"/></g><g clip-path="url(#a-p)">'
        '<use href="#a-m" style="fill:red"/><use href="#a-m" style="fill:blue"/></g></svg>'
    )
