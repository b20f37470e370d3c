"""A page with a section for each zoo, of which a run may write one."""

from collections.abc import Iterable
from pathlib import Path


def write_section(page: Path, head: str, zoos: Iterable[str], zoo: str, lines: list[str]) -> None:
    """Put ``lines`` in the section of ``zoo``; ``head`` is new, the other sections stay."""
    text = page.read_text() if page.exists() else head
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    sections[zoo] = "\n".join(lines) + "\n"
    page.write_text(head + "".join(f"\n## {n}\n{sections[n]}" for n in zoos if n in sections))
