"""Labels that look like one class: named once, and not merged."""

from __future__ import annotations

import pytest

from evertune.sources.alike import alike, alike_words
from evertune.streams.experience import Experience, ExperienceStream

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["sport", "law", "Sport", "SPORT"], [["sport", "Sport", "SPORT"]]),
        (["sport", "sport ", "\u00a0sport"], [["sport", "sport ", "\u00a0sport"]]),
        ([COMPOSED, DECOMPOSED], [[COMPOSED, DECOMPOSED]]),
        (["True", "true", "False"], [["True", "true"]]),
        (["STRASSE", "straße"], [["STRASSE", "straße"]]),
        (["ﬁle", "file"], [["ﬁle", "file"]]),
        (["a", "b", "a"], []),
        (["1", "1.0", "01"], []),
        ([], []),
    ],
)
def test_names_that_look_like_one(names: list[str], groups: list[list[str]]) -> None:
    assert alike(names) == groups
    assert bool(alike_words(groups)) is bool(groups)


def test_forms_that_look_the_same_are_shown_apart() -> None:
    assert f"{COMPOSED!r} and 'cafe\\u0301'" in alike_words(alike([COMPOSED, DECOMPOSED]))


def test_a_stream_warns_once() -> None:
    rows = [[{"text": "a", "label": "Sport"}], [{"text": "b", "label": "sport"}, {"text": "c", "label": "law"}]]
    parts = [Experience(f"day {n}", part, classes=sorted({r["label"] for r in part})) for n, part in enumerate(rows)]
    with pytest.warns(UserWarning, match="learned as different classes: 'Sport' and 'sport'") as caught:
        stream = ExperienceStream(parts, label="label")
        assert stream[1:].classes == ["law", "sport"]
    assert len(caught) == 1
    assert stream.classes == ["Sport", "law", "sport"]
