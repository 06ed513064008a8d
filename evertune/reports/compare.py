"""A comparison of two versions as one self-contained HTML page."""

from __future__ import annotations

import math
import os
from pathlib import Path

from evertune.live.compare import Compared, Flip
from evertune.reports.page import fill

MAX_FLIPS = 100
"""Number of records shown of each side; the JSON file has all."""
MAX_CLASSES, MAX_CONFUSIONS = 60, 30


def write_comparison(found: Compared, out: str | os.PathLike[str] = "compare.html") -> Path:
    """Write a comparison as one self-contained page: no network, no script. Needs the extra ``evertune[reports]``.

    Texts of the records are on it. All text is escaped.

    Args:
        found: What :func:`~evertune.live.compare.compare_versions` returned.
        out: File to write; its folders are created.

    Returns:
        The path of the page.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    before, now = found.versions
    page = fill(
        "compare.html",
        title=f"Version {now} against version {before}",
        found=found,
        names=[f"version {before}", f"version {now}"],
        classes=[one for one in found.classes if one.records and one.found[0] != one.found[1]][:MAX_CLASSES],
        unchanged=sum(one.found[0] == one.found[1] for one in found.classes),
        confusions=[one for one in found.confusions if one.records[0] != one.records[1]][:MAX_CONFUSIONS],
        sides=[
            ("Became worse", found.worse[:MAX_FLIPS], len(found.worse)),
            ("Became better", found.better[:MAX_FLIPS], len(found.better)),
        ],
        answers=answers,
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def answers(flip: Flip) -> list[str]:
    """What both versions say of a record, with its probability, or the score of a task without classes."""
    if not any(flip.answers):
        return [f"{score:.3f}" for score in flip.scores]
    said = []
    for answer, confidence in zip(flip.answers, flip.confidence, strict=True):
        words = answer if isinstance(answer, str) else ", ".join(answer) or "no class"
        said.append(words if math.isnan(confidence) else f"{words} ({100 * confidence:.0f} %)")
    return said
