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
    assert inline_svg(FILE, "loss", 'A "<b>"', 300).split("\n") == [
        '<svg role="img" aria-label="A &quot;&lt;b&gt;&quot;" style="max-width: 300px" '
        'viewBox="0 0 10 5">',
        " ",
        ' <defs><clipPath id="loss-p"/></defs>',
        ' <use xlink:href="#loss-m" clip-path="url(#loss-p)"/>',
        "</svg>",
    ]
