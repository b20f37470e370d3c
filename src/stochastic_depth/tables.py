"""Tables as notebooks show them."""

import html
from collections.abc import Iterable, Sequence

__all__ = ["table_html"]


def table_html(lines: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table as HTML: its head is the first line, and below it stand the notes.

    Example:
        >>> from stochastic_depth.tables import table_html
        >>> table_html([("branch", "p"), ("layer1.0:conv1", "0.2")])[:46]
        '<table><thead><tr><th>branch</th><th>p</th></t'
    """
    head, *rows = lines
    below = f"<pre>{html.escape(chr(10).join(notes))}</pre>" if notes else ""
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    return (
        f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>{below}"
    )


def _cells(line: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
