"""Masks personal data when a record arrives, before any of it reaches memory or disk."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from itertools import groupby
from pathlib import Path
from typing import Any

_LONG_NUMBER = 10**12  # cards have 13 digits or more


class Masker(ABC):
    """Replaces personal data in texts by their kind: ``<EMAIL>``, ``<PHONE>``, ..."""

    @abstractmethod
    def mask(self, text: str) -> str:
        """The text with recognised personal data replaced."""

    def mask_value(self, value: Any) -> Any:
        """A value of a record with personal data masked, at any depth.

        Texts, keys, numbers long enough to be a card number, and values whose text form contains personal data are
        masked. Bytes become text.
        """
        if isinstance(value, str):
            return self.mask(value)
        if value is None or (isinstance(value, (int, float)) and not abs(value) >= _LONG_NUMBER):
            return value
        if isinstance(value, Mapping):
            return {self.mask(str(key)): self.mask_value(part) for key, part in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.mask_value(part) for part in value]
        if isinstance(value, (bytes, bytearray)):
            return self.mask(value.decode(errors="backslashreplace"))
        text = str(value)
        masked = self.mask(text)
        return value if masked == text else masked

    def mask_id(self, text: str) -> str:
        """The id of a record; if it contains personal data, a hash of it.

        The same id gives the same hash, so that a label still finds its text. The hash is not secret: anyone who knows
        an id can compute it.
        """
        if self.mask(text) == text:
            return text
        return masked_id(text)


def masked_id(id: str) -> str:
    """The hash by which a :class:`Masker` replaces an id that contains personal data."""
    return "masked-" + hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class _Pattern:
    """How one kind of data is found, in time linear in the length of the text.

    Args:
        hint: Quick search; without a match, the pattern is not tried.
        pattern: Finds candidates. Its repetitions are possessive or short, or match in one way only, so that it
            cannot backtrack for long. Groups are not possessive: Python before 3.11.5 gets some of them wrong.
        replacement: Text that replaces a match.
        length: Length of the match, from the start of a candidate; 0 if the candidate is not a match.
    """

    hint: re.Pattern[str]
    pattern: re.Pattern[str]
    replacement: str
    length: Callable[[str], int] = len

    def mask(self, text: str) -> str:
        parts, done, match = [], 0, self.pattern.search(text)
        while match:
            start, length = match.start(), self.length(match[0])
            if length:
                parts += [text[done:start], self.replacement]
                done = start + length
            match = self.pattern.search(text, start + (length or 1))
        return "".join(parts) + text[done:] if parts else text


# The lengths of IBANs by country (SWIFT IBAN registry).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
# First digits and lengths of card numbers: Visa, Mastercard, Amex, Diners, JCB, Discover, UnionPay, Maestro.
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|6\d{15,18}|5[06-9]\d{14,17}"
)
_DATE = re.compile(r"\d\d([./-])\d\d\1(?:19|20)\d\d(?!\d)")
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def _card_length(candidate: str) -> int:
    return next((length for length in (len(candidate), 19) if _is_card(_digits(candidate[:length]))), 0)


def _is_card(digits: str) -> bool:
    # The Luhn algorithm: every second digit from the right is doubled, and its digits are added.
    luhn = sum(map(int, digits[-1::-2])) + sum(_DOUBLED[int(digit)] for digit in digits[-2::-2])
    return luhn % 10 == 0 and _CARD.fullmatch(digits) is not None


def _iban_length(candidate: str) -> int:
    places = [place for place, char in enumerate(candidate) if char.isalnum()]
    length = _IBAN_LENGTHS.get(candidate[:2].upper(), len(places) + 1)
    if len(places) < length:
        return 0
    end = places[length - 1] + 1
    account = "".join(candidate[place] for place in places[:length])
    # ISO 7064: the first four characters go to the end, letters become two digits, and the remainder must be 1.
    number = int("".join(str(int(char, 36)) for char in account[4:] + account[:4]))
    return end if number % 97 == 1 and not candidate[end : end + 1].isalnum() else 0


def _ipv6_length(candidate: str) -> int:
    try:
        IPv6Address(candidate)
    except AddressValueError:
        return 0
    return len(candidate) if len(candidate) > 5 and any(map(str.isdigit, candidate)) else 0


def _phone_length(candidate: str) -> int:
    return len(candidate) if 9 <= len(_digits(candidate)) <= 15 and not _DATE.match(candidate) else 0


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


_AT = re.compile("@")
_NUMBER = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}", re.ASCII)  # the digits that any card, account or phone has
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_BEFORE = r"(?<![\w+.,:/-])"  # an American or local phone number must not follow these
_PATTERNS: dict[str, list[_Pattern]] = {
    "url_credentials": [_Pattern(_AT, re.compile(r"://[^\s/?#]*@"), "://<CREDENTIALS>@")],
    # An address has at most 254 characters (RFC 5321). Without that limit, each quote in a long text of letters and
    # quotes would begin a search to its end.
    "email": [_Pattern(_AT, re.compile(r"(?<![\w.+%-])\w[\w.+%'-]{0,253}+@[\w-]++(?:\.[\w-]++)+"), "<EMAIL>")],
    "secret": [
        _Pattern(
            re.compile("AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|AIza|sk-|k_live_|k_test_|xox|eyJ"),
            re.compile(
                r"(?<![\w-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{36,}+|github_pat_\w{22,}+|glpat-[\w-]{20,}+"
                r"|AIza[\w-]{35}|sk-[\w-]{20,}+|[rs]k_(?:live|test)_\w{16,}+|xox[abeoprs]-[\w-]{10,}+"
                r"|eyJ[\w-]{10,}+\.[\w-]{10,}+\.[\w-]++)",
                re.ASCII,
            ),
            "<SECRET>",
        ),
        _Pattern(
            re.compile("PRIVATE KEY"),
            re.compile(
                r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]|-(?!----))*(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
            ),
            "<SECRET>",
        ),
    ],
    "iban": [
        _Pattern(
            _NUMBER,
            re.compile(r"(?<![^\W_])[A-Z]{2}\d\d(?:[ \xa0-]?[A-Z0-9]){11,30}", re.ASCII | re.IGNORECASE),
            "<IBAN>",
            _iban_length,
        )
    ],
    "credit_card": [
        _Pattern(
            _NUMBER,
            re.compile(
                r"\d(?<![\d+]\d)(?<!\d[.,]\d)(?:\d{12,18}"
                r"|\d{3}([ .\xa0-])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{3}([ .\xa0-])\d{6}\2\d{4,5})(?!\d)",
                re.ASCII,
            ),
            "<CREDIT_CARD>",
            _card_length,
        )
    ],
    "phone": [
        _Pattern(
            _NUMBER,
            re.compile(r"(?<![\w+.,/-])(?:\+|00)[1-9](?:[ .\xa0/()-]{0,3}\d){6,14}(?!\d)", re.ASCII),
            "<PHONE>",
        ),
        _Pattern(
            _NUMBER,
            re.compile(
                _BEFORE
                + r"(?:0[1-9]\d{8,9}|(?:0[1-9]\d{0,4}|\(0[1-9]\d{0,4}\))(?:[ .\xa0/-]{1,2}\d{1,8}){1,5})(?!\w|[.,:]\d)",
                re.ASCII,
            ),
            "<PHONE>",
            _phone_length,
        ),
        _Pattern(
            _NUMBER,
            re.compile(
                _BEFORE + r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .\xa0-])[2-9]\d\d[ .\xa0-]\d{4}(?!\w|[.,:-]\d)",
                re.ASCII,
            ),
            "<PHONE>",
        ),
    ],
    "ip": [
        _Pattern(
            re.compile(r"\d\.\d{1,3}\.\d", re.ASCII),
            re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)", re.ASCII),
            "<IP>",
        ),
        _Pattern(
            re.compile(":[0-9A-Fa-f]{0,4}:"),
            re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII),
            "<IP>",
            _ipv6_length,
        ),
    ],
}


class PatternMasker(Masker):
    """Masks data of a recognisable form, with patterns and checksums. It does not find names of people and places.

    Where a pattern alone would also hit ordinary numbers, a checksum decides (credit cards, IBAN) or the form is
    strict: a phone number is written with a country code (``+49 30 901820``, ``0049...``), with the 0 of the area code
    (``020 7946 0958``), or in the American groups (``(555) 234-5678``); other local numbers are not recognised.

    Args:
        kinds: Kinds of data to mask, by default all:

            - ``"email"`` becomes ``<EMAIL>``;
            - ``"phone"`` becomes ``<PHONE>``;
            - ``"credit_card"`` (13 to 19 digits of the card schemes' numbers with a valid check digit) becomes
              ``<CREDIT_CARD>``;
            - ``"iban"`` (of the country's length, with valid check digits) becomes ``<IBAN>``;
            - ``"ip"`` (IPv4 and IPv6) becomes ``<IP>``;
            - ``"url_credentials"``: ``https://user:password@host`` becomes ``https://<CREDENTIALS>@host``;
            - ``"secret"`` (what has a well-known form: keys of AWS, GitHub, GitLab, Google, OpenAI, Slack and Stripe,
              JSON web tokens, PEM private keys) becomes ``<SECRET>``.

    Raises:
        ValueError: If a kind is unknown, or the list is empty.

    Example:
        >>> PatternMasker().mask("Write to ann@example.com or call +44 20 7946 0958 by 17.05.2024")
        'Write to <EMAIL> or call <PHONE> by 17.05.2024'
    """

    def __init__(self, kinds: list[str] | None = None) -> None:
        kinds = list(_PATTERNS) if kinds is None else kinds
        if isinstance(kinds, str) or not kinds or not set(kinds) <= set(_PATTERNS):
            raise ValueError(f"kinds must be some of {', '.join(_PATTERNS)}; got {kinds!r}")
        self.kinds = [kind for kind in _PATTERNS if kind in kinds]
        patterns = [pattern for kind in self.kinds for pattern in _PATTERNS[kind]]
        self._groups = [(hint, list(group)) for hint, group in groupby(patterns, key=lambda pattern: pattern.hint)]

    def mask(self, text: str) -> str:
        for hint, patterns in self._groups:
            if hint.search(text):
                for pattern in patterns:
                    text = pattern.mask(text)
        return text


class PresidioMasker(Masker):
    """Masks with Microsoft's Presidio, which with a language model also finds the names of people and places.

    Needs ``pip install "evertune[presidio]"``. It is some hundred times slower than :class:`PatternMasker`. To validate
    the domains of e-mail addresses, Presidio fetches the public suffix list once; offline, it uses a bundled one.

    Args:
        model: Name of an installed spaCy model (``"en_core_web_lg"``), or its folder. None: no model; data of a
            recognisable form are found (e-mail addresses, cards, phone numbers, ...), but names are not.
        language: Language of the texts.
        entities: Presidio's names of the entities to mask (``["PERSON", "EMAIL_ADDRESS"]``). By default all but dates,
            times and web addresses, which are seldom personal and which a classifier may need.
        threshold: Minimum confidence of Presidio, from 0 to 1. The default is its score of a phone number without
            context.

    Raises:
        ValueError: If the model is not installed, an entity is unknown, or the threshold is not between 0 and 1.
        ModuleNotFoundError: If Presidio is not installed.
    """

    _LEFT = frozenset({"DATE_TIME", "URL"})
    _NAMES = {"EMAIL_ADDRESS": "EMAIL", "PHONE_NUMBER": "PHONE", "IBAN_CODE": "IBAN", "IP_ADDRESS": "IP"}  # noqa: RUF012

    def __init__(
        self,
        model: str | None = None,
        language: str = "en",
        entities: list[str] | None = None,
        threshold: float = 0.4,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        try:
            import spacy  # type: ignore[import-not-found]
            from presidio_analyzer import AnalyzerEngine  # type: ignore[import-not-found]
            from presidio_analyzer.nlp_engine import SpacyNlpEngine  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f'PresidioMasker needs {error.name}: pip install "evertune[presidio]"') from error

        engine: Any = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model or ""}])
        if model is None:
            engine.nlp = {language: spacy.blank(language)}  # type: ignore[assignment]
        elif not (spacy.util.is_package(model) or Path(model).exists()):  # Presidio would download it
            raise ValueError(f"the spaCy model {model!r} is not installed: python -m spacy download {model}")
        self._analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=[language])
        if model is None:
            self._analyzer.registry.remove_recognizer("SpacyRecognizer")
        known = set(self._analyzer.get_supported_entities(language))
        if entities is not None and (not entities or not set(entities) <= known):
            raise ValueError(f"entities must be some of {sorted(known)}, got {entities!r}")
        self.model, self.language, self.threshold = model, language, threshold
        self.entities = sorted(known - self._LEFT if entities is None else entities)

    def mask(self, text: str) -> str:
        found = self._analyzer.analyze(
            text, language=self.language, entities=self.entities, score_threshold=self.threshold
        )
        parts, done, best = [], 0, 0.0
        for result in sorted(found, key=lambda result: (result.start, -result.score)):
            name = f"<{self._NAMES.get(result.entity_type, result.entity_type)}>"
            if result.start >= done:
                parts += [text[done : result.start], name]
                best = result.score
            elif result.score > best:  # overlaps with the one before: the name with the higher score stands for both
                parts[-1], best = name, result.score
            done = max(done, result.end)
        return "".join(parts) + text[done:]
