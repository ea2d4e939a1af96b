"""A drawing that matplotlib saved becomes a part of a page."""

import re
from html import escape


def inline_svg(text: str, name: str, title: str, width: int) -> str:
    """An SVG file as an element that shares a page with others.

    Prolog, metadata and namespaces go (HTML knows them), ids become the page's own, the size gives
    way to `max-width`, and the title becomes the accessible name. What shows nothing goes too: see
    `_smaller`.

    Args:
        text: The file.
        name: Unlike that of any other drawing of the page; all ids begin with it.
        title: What a screen reader says.
        width: At most so wide, in CSS pixels.
    """
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = _smaller(svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    opening = (
        f'<svg role="img" aria-label="{escape(title)}" style="max-width: {width}px" '
        f"{view_box.group() if view_box else ''}>"
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()


def _smaller(svg: str) -> str:
    """The same drawing in about a third of the letters.

    Ids that nothing refers to go, as do fonts, which are the page's, turns by 0 degrees and white
    space. Numbers keep five digits: of a drawing 900 points wide that is a hundredth of a point.
    Markers of one style have it from their group; no figure gives a marker an opacity as a whole.

    Example: `<path d="M 0 208.8` `L 43.088521 2 "/>` becomes `<path d="M0 208.8L43.089 2"/>`.
    """
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', svg))

    def smaller(tag: re.Match[str]) -> str:
        text = re.sub(r"\s+", " ", tag[0])
        text = re.sub(r' id="([^"]*)"', lambda x: x[0] if x[1] in used else "", text)
        text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
        text = re.sub(r"font-family: [^;\"]*(; )?", "", text)
        text = re.sub(r"\d+\.\d{3,}", lambda x: f"{float(x[0]):.5g}", text)
        text = re.sub(
            r'(?<= d=")[^"]*', lambda x: re.sub(r" ?([A-Za-z]) ?", r"\1", x.group()), text
        )
        return re.sub(r'(?<= style=")[^"]*', lambda x: re.sub(r"([:;]) ", r"\1", x.group()), text)

    svg = re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", smaller, svg))
    of_one_style = (
        r'(<g clip-path="[^"]*")>(<use [^>]*( style="[^"]*")/>(?:<use [^>]*\3/>)*)(?=</g>)'
    )
    return re.sub(of_one_style, lambda x: f"{x[1]}{x[3]}>{x[2].replace(x[3], '')}", svg)
