"""Finds labels that are probably one class and were spelled differently."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def alike(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, spaces at their ends or Unicode form, such as ``True`` and ``"true"``.

    Example:
        >>> alike(["sport", "law", "Sport ", "True", "true"])
        [['sport', 'Sport '], ['True', 'true']]
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        # Case is folded between two normalisations, as it may change the form ("ΐ").
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        groups.setdefault(folded.strip(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def alike_words(groups: Iterable[list[str]]) -> str:
    """What is wrong with groups of :func:`alike`, as a message; empty if there are none."""
    named = "; ".join(" and ".join(map(_quoted, group)) for group in groups)
    if not named:
        return ""
    return (
        "labels that differ only in case, spaces at their ends or Unicode form are learned as different classes: "
        f"{named}; if they are one, spell them alike in the source"
    )


def _quoted(name: str) -> str:
    """A name in quotes; one that is not in the usual composed form is shown with escapes, else it looks the same."""
    return repr(name) if unicodedata.is_normalized("NFKC", name) else ascii(name)
