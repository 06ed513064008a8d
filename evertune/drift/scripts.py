"""Scripts in which words are not separated by spaces."""

from __future__ import annotations

import re

_BLOCKS = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff"  # Hangul: it has spaces, but its words take many forms
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df\uaa00-\uaa5f"  # Balinese, Javanese, Cham
    "\u2e80-\u2fff\u3001-\u312f\u31a0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff61-\uffdc"  # Chinese, Japanese
    "\ua000-\ua4cf"  # Yi
    "\U00012000-\U0001342f\U00017000-\U00018cff\U0001b000-\U0001b2ff\U00020000-\U000323af"  # the rest of these
)
_MARKS = (  # vowel signs and accents, which re does not count as parts of words
    "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u0900-\u0963\u0966-\u0dff"
    "\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ece\u0f71-\u0f84\u0f8d-\u0fbc\u102b-\u103e\u1056-\u1059"
    "\u135d-\u135f\u1712-\u1715\u17b4-\u17d3\u17dd\u1a55-\u1a7f\u1b34-\u1b44\ua980-\ua983\ua9b3-\ua9c0\u200c\u200d"
)
_LONG = 16  # characters; a longer run without a space is rarely a word
_LETTER = rf"(?:[^\W_{_BLOCKS}]|[{_MARKS}])"
_PIECE = re.compile(rf"[{_BLOCKS}]|[^\s{_BLOCKS}]+")
_WORD = re.compile(rf"(?=[{_BLOCKS}])[^\W_][{_MARKS}]*|{_LETTER}+(?:['\u2019-]{_LETTER}+)*")
_UNSPACED = re.compile(rf"[{_BLOCKS}][{_MARKS}]*")


def pieces_of(text: str) -> list[str]:
    """What stands between spaces, in lower case; of scripts without spaces, and of runs that are too long for words,
    the single characters. Pairs of these are then pairs of words or of characters.

    Example:
        >>> pieces_of("The iPhone15坏了!")
        ['the', 'iphone15', '坏', '了', '!']
    """
    text = text.lower()
    found = text.split() if text.isascii() else _PIECE.findall(text)
    return [part for piece in found for part in (piece if len(piece) > _LONG else (piece,))]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; of scripts without spaces, the single characters, with
    their marks.

    Example:
        >>> words_of("Don't panic, it's state-of-the-art: 42!"), words_of("退款, please")
        (["don't", 'panic', "it's", 'state-of-the-art', '42'], ['退', '款', 'please'])
    """
    return _WORD.findall(text.lower())


def places_of(text: str) -> list[tuple[int, int]]:
    """Where the pieces of a text begin and end: what stands between spaces, and single characters in scripts without.

    Example:
        >>> places_of("a good day"), places_of("坏了!")
        ([(0, 1), (2, 6), (7, 10)], [(0, 1), (1, 2), (2, 3)])
    """
    return [match.span() for match in _PIECE.finditer(text)]


def without_space(word: str) -> bool:
    """Whether a word is a character of a script without spaces."""
    return _UNSPACED.fullmatch(word) is not None
