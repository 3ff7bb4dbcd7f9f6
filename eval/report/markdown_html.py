"""Converts Markdown tables of other commands to HTML for the report, without raw HTML, links or pictures."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.token import Token

_NUMBER = re.compile(r"[-+]?[\d.,]+\s*(%|×|\(.*\))?|-?|reference")  # noqa: RUF001
_LEVEL = 4  # of headings, below that of the section


def markdown_to_html(text: str) -> str:
    """Converts Markdown with tables to HTML.

    Columns of numbers get the class ``number``. Raw HTML, links and images are rendered as text, since a report makes
    no requests.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{_LEVEL}"
    _format_tables(tokens)
    page = parser.renderer.render(tokens, parser.options, {})
    return page.replace("<table>", '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>').replace(
        "</table>", "</table></div>"
    )


def _format_tables(tokens: list[Token]) -> None:
    """Sets the scope of headings and the class of numeric columns; the page's policy forbids inline styles."""
    starts = [i for i, token in enumerate(tokens) if token.type == "table_open"]
    for start in starts:
        columns: dict[int, list[tuple[Token, str]]] = {}
        column = 0
        for i in range(start, next(i for i in range(start, len(tokens)) if tokens[i].type == "table_close")):
            token = tokens[i]
            if token.type == "tr_open":
                column = 0
            elif token.type in ("th_open", "td_open"):
                token.attrs = {"scope": "col"} if token.type == "th_open" else {}
                columns.setdefault(column, []).append((token, tokens[i + 1].content))
                column += 1
        for cells in columns.values():
            texts = [text.strip("* ") for token, text in cells if token.type == "td_open"]
            if any(texts) and all(_NUMBER.fullmatch(text) for text in texts):
                for token, _ in cells:
                    token.attrSet("class", "number")
