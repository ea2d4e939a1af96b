"""A drawing that matplotlib saved becomes a part of a page."""

import re
from html import escape


def inline_svg(text: str, name: str, title: str, width: int) -> str:
    """An SVG file as an element that shares a page with others.

    Prolog, metadata and namespaces go (HTML knows them), ids become the page's own, the size gives
    way to `max-width`, and the title becomes the accessible name.

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
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    opening = (
        f'<svg role="img" aria-label="{escape(title)}" style="max-width: {width}px" '
        f"{view_box.group() if view_box else ''}>"
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
