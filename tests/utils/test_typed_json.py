"""Foreign JSON: whatever is wrong with it is a ValueError that says what."""

from dataclasses import dataclass, field
from datetime import datetime

import pytest

from evertune.utils.typed_json import decode, read_json


@dataclass
class Inner:
    number: int


@dataclass
class Outer:
    name: str
    share: float = 0.0
    when: datetime | None = None
    inner: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff{}", "utf-8"),
        (b"[" * 200_000, "nested more than 100 levels deep"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 levels deep"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested more than 100 levels deep"),
        (b"1e400", "the number 1e400, which is not finite"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b"9" * 5000, "4300"),
        (rb'"\ud800"', "half of a surrogate pair"),
        (rb'{"\uDFFF": 1}', "half of a surrogate pair"),
        (b'"' + b"x" * 100 + b'"', "it has 102 bytes, more than the 99 that are read"),
    ],
)
def test_what_cannot_be_decoded_is_a_value_error(content, message):
    with pytest.raises(ValueError, match=message):
        decode(content, most_bytes=99 if b"xxx" in content else 2**20)


def test_what_is_allowed_is_decoded():
    assert decode(b"[" * 100 + b"]" * 100)
    assert decode(b"[" + b"[],{}," * 500 + b"0.5]")[-1] == 0.5  # many brackets, none of them deep
    assert decode(rb'"\ud83d\ude00"') == "\N{GRINNING FACE}"
    assert decode(rb'"\ud800"', surrogates=True) == "\ud800"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"it must be an object, got \[\]"),
        (b"{}", "'name' is missing"),
        (b'{"name": 1}', "'name' must be a string, got 1"),
        (b'{"name": "a", "share": 1%s}' % (b"0" * 400), "'share' must be a number, got 10+.*, which is too large"),
        (b'{"name": "a", "share": true}', "'share' must be a number, got True"),
        (b'{"name": "a", "when": "0001-01-01T00:00:00+14:00"}', "'when' must be a time in ISO 8601"),
        (b'{"name": "a", "when": "yesterday"}', "'when' must be a time in ISO 8601, got 'yesterday'"),
        (b'{"name": "a", "inner": [{"number": 1}, {"number": "2"}]}', r"'inner\[1\].number' must be a whole number"),
        (b'{"name": "a", "inner": {}}', "'inner' must be a list, got {}"),
        (b'{"name": %s}' % (b"[" + b"1," * 5000 + b"1]"), r"'name' must be a string, got \[1, 1.{,80}\.\.\.$"),
    ],
)
def test_what_does_not_fit_the_type_is_a_value_error(content, message):
    with pytest.raises(ValueError, match=message):
        read_json(Outer, content)
