"""Plain language: phrases that keep creeping in and that a reader would stumble over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PHRASES = {
    r"\banew\b(?!\()": "again, from scratch, start over",
    r"\blearnt\b": "learned",
    r"\bin vain\b": "without effect, or what it leads to",
    r"\b(its|their) kin\b": "such as, and similar",
    r"\bsigns? of life\b": "heartbeat",
    r"\b(is|are) no (file|folder|name|number|list|accuracy matrix|JSON)\b": "is not a ...",
    r"\b(is|are) told once\b": "is reported once",
    r"\bthe same bits\b|\b(keep|keeps) (its|their) bits\b": "bit-identical",
    r"\bgoes on from\b": "resumes from",
    r"\btoo dear\b": "too expensive",
}
"""Regular expressions, and what to write instead."""


def documents() -> Iterator[Path]:
    """Everything that users read: code, documents and examples."""
    for folder, suffixes in (("evertune", ".py .html"), ("docs", ".md"), ("examples", ".py .md .yaml")):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes.split())
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))


def complaints(text: str, name: str = "text") -> list[str]:
    """A line for each phrase in a text. Phrases may be broken over two lines, with comment signs between."""
    found = []
    for phrase, better in PHRASES.items():
        for match in re.finditer(phrase.replace(" ", r"[\s#]+"), text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {match[0]!r}; better: {better}")
    return found


def test_no_stilted_phrases() -> None:
    texts = {path: path.read_text() for path in documents()}
    assert len(texts) > 100
    found = [line for path, text in texts.items() for line in complaints(text, str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_phrases_are_found_with_their_lines() -> None:
    assert complaints("a fit\nthat starts anew, and\nends in the same\nbits") == [
        "text:2: 'anew'; better: again, from scratch, start over",
        "text:3: 'the same\\nbits'; better: bit-identical",
    ]
    assert complaints("trainer.anew(callbacks)\nit is not a file") == []
