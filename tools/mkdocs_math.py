"""A hook of mkdocs: formulas between `$$` become MathML when the site is built, so no page loads a script for them."""

from __future__ import annotations

import re

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **context: object) -> str:
    return re.sub(
        r"^\$\$\n(.+?)\n\$\$$", lambda formula: convert(formula[1], display="block"), markdown, flags=re.M | re.S
    )
