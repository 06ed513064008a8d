"""Whatever arrives, no update fails, and each record is trained on, held out, pending, or in quarantine."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evertune.callbacks import Replay
from evertune.live.slices import load_slice
from evertune.live.update import Updater
from evertune.memory.view import MemoryView
from evertune.registry.rows import latest
from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.live_worker import lenient_gate, updater

LABELS = ["business", "sport"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["", " ", "nan", "\ud800", "\0", "[/x]", "\x1b[31m", "e\u0301", "9999-12-31T00:00:00Z"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SENTENCES = st.sampled_from([text for name in LABELS for text in TEXTS[name]])
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "text": SENTENCES | st.text(max_size=40) | SENTENCES.map(lambda text: text * 60) | VALUES,
        "label": st.sampled_from([*LABELS, "Sport", "sport ", "SPORT", ["sport"], [], ["business", "sport"]]) | VALUES,
        "id": st.integers(0, 30) | st.text(max_size=6) | VALUES,
        "time": st.sampled_from(["2026-01-02T03:04:05Z", "2026-01-02", 1767322800, 20260102]) | VALUES,
        "other": VALUES,
    },
)
ALMOST_GOOD = st.fixed_dictionaries(
    {"text": SENTENCES, "label": st.sampled_from(LABELS), "id": st.integers(0, 30)},
    optional={"time": st.just("2026-01-02T03:04:05Z"), "other": VALUES},
)
DEEP = st.sampled_from(
    ["[" * 100_000, '{"a":' * 5_000, '{"text": "' + "x" * 100_000, "[1e999]", "\ufeff{}", "{}{}", "5"]
)
LINES = ALMOST_GOOD.map(json.dumps) | RECORDS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=30) | DEEP
SCHEMAS = [RecordSchema(id="id"), RecordSchema(id="id", time="time"), RecordSchema()]

_counted: Counter[str] = Counter()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def write(folder: Path, name: str, lines: list[str]) -> None:
    """A file of lines: those given, and enough good ones for an update."""
    good = [
        {"id": f"{name}-{label}-{i}", "text": f"{text} {i}", "label": label, "time": "2026-01-02T03:04:05Z"}
        for label in LABELS
        for i, text in enumerate(TEXTS[label] * 4)
    ]
    separate = [line.replace("\r", " ").replace("\n", " ") for line in lines]
    content = "\n".join([*separate, *map(json.dumps, good)]) + "\n"
    (folder / "inbox" / f"{name}.jsonl").write_bytes(content.encode("utf-8", "surrogatepass"))


def content(row: Row) -> tuple[str, str]:
    return row["record"]["text"], row["record"]["label"]


def check(live: Updater, n_lines: int) -> None:
    """Each record that was read is in exactly one place."""
    journal, production = live.journal, live.registry.production
    segments = journal.segments()
    kept = journal.records(segments)
    set_aside = [row for row in journal.quarantined() if row["kind"] != "withdrawn"]
    assert sum(segment.read for segment in segments) == n_lines
    consumed = production.manifest.consumed if production else 0
    learned, superseded = latest(journal.records(s for s in segments if s.number <= consumed))
    inside, outside = ([row["origin"] for row in rows] for rows in (kept, set_aside))
    assert len(set(inside)) == len(inside) and len(set(outside)) == len(outside)
    assert len({*inside, *outside}) == n_lines
    # A record that a newer one of the same update has replaced is noted in quarantine, and still in the journal.
    assert {*inside} & {*outside} <= {row["origin"] for row in superseded}
    assert all(row["reason"] for row in set_aside)
    if production is not None:
        trained = set(MemoryView.open(next((production.folder() / "learning").rglob("*.arrow"))).ids)
        held = [row for entry in production.slices() for row in load_slice(live.registry.store, entry)]
        ids, contents = {row["id"] for row in held}, {content(row) for row in held}
        # A newer record of an id that was trained on may be held out; nothing else is both.
        assert trained & ids <= {row["id"] for row in superseded}
        # A copy of a held-out record under another id is not trained on either.
        assert all(row["id"] in trained or row["id"] in ids or content(row) in contents for row in learned)
        assert trained | ids <= {row["id"] for row in learned}
    _counted.update(read=n_lines, learned=len(learned), pending=len(kept) - len(learned) - len(superseded))
    _counted.update(row["kind"] for row in set_aside)


def learn(bert: str, rounds: list[list[str]], schema: RecordSchema) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "inbox").mkdir()
        (folder / "bert").symlink_to(bert)
        n_lines = 0
        for number, lines in enumerate(rounds):
            write(folder, f"round{number}", lines)
            live = updater(
                folder,
                schema=schema,
                gate=lenient_gate(max_bad_share=None),
                trainer={"max_epochs": 1, "callbacks": [Replay(memory_size=100_000, id="id")]},
            )
            outcome = live.run()
            assert outcome.status == "promoted", outcome.words
            n_lines = sum(
                1 for path in (folder / "inbox").iterdir() for line in path.read_bytes().split(b"\n") if line.strip()
            )
            check(live, n_lines)


def explore(bert: str, examples: int) -> Counter[str]:
    """What became of all the records of some examples."""
    _counted.clear()

    @given(
        rounds=st.lists(st.lists(LINES, min_size=80, max_size=160), min_size=1, max_size=2),
        schema=st.sampled_from(SCHEMAS),
    )
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=False,
        report_multiple_bugs=False,
    )
    def one(rounds: list[list[str]], schema: RecordSchema) -> None:
        learn(bert, rounds, schema)

    one()
    return _counted


def test_nothing_is_lost(bert: str) -> None:
    found = explore(bert, 8)
    assert found["read"] > 1_000, found
    assert min(found[kind] for kind in ("learned", "refused", "unreadable", "superseded")) > 0, found


@pytest.mark.slow
def test_nothing_of_ten_thousand_records_is_lost(bert: str) -> None:
    found = explore(bert, 60)
    assert found["read"] > 10_000, found
