"""SQLSource against SQLite, and against a real PostgreSQL where a server and its driver are installed."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from evertune.sources.base import SourceError
from evertune.sources.sql import SQLSource
from tests.helpers.servers import Postgres, check_contract, read_all

EARLY = "2020-01-01 00:00:00"


class Database:
    """A database with one table, and its word for a TIME."""

    def __init__(self, url):
        self.url = url
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)
        self.time = "TIMESTAMP" if url.startswith("sqlite") else "TIMESTAMPTZ"

    def do(self, *statements):
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    def make(self, columns):
        columns = re.sub(r"\bTIME\b", self.time, columns)
        self.do("DROP TABLE IF EXISTS tickets", f"CREATE TABLE tickets ({columns})")

    def insert(self, rows):
        names = list(rows[0])
        statement = f"INSERT INTO tickets ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), rows)

    def source(self, table="tickets", **options):
        return SQLSource(self.url, table=table, **options)


@pytest.fixture(scope="session")
def postgres():
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request, tmp_path):
    if request.param == "sqlite":
        return Database(f"sqlite:///{tmp_path / 'tickets.db'}")
    return Database(request.getfixturevalue("postgres").url)


@pytest.fixture
def lite(tmp_path):
    return Database(f"sqlite:///{tmp_path / 'tickets.db'}")


def texts(records):
    return [record.value["text"] for record in records]


def expected(start, stop):
    return [f"text {i}" for i in range(start, stop)]


def test_contract_by_number(database):
    database.make("n INTEGER PRIMARY KEY, id TEXT, text TEXT")
    source = database.source(cursor="n", columns=["id", "text"])
    check_contract(source, lambda rows: database.insert([{"n": int(row["id"]) + 2**30, **row} for row in rows]))


def test_contract_by_time_with_ties(database):
    database.make("id TEXT PRIMARY KEY, text TEXT, at TIME")

    def add(rows):
        for row in rows:
            row["at"] = f"2026-03-29 0{int(row['id']) // 10}:30:00"
            row["id"] = row["id"].zfill(3)
        if database.url.startswith("postgresql"):
            for row in rows:
                database.do(f"INSERT INTO tickets VALUES ('{row['id']}', '{row['text']}', '{row['at']}')")
        else:
            database.insert(rows)

    check_contract(database.source(cursor="at", columns=["id", "text"]), add)


def test_contract_by_a_query(database):
    database.make("n INTEGER PRIMARY KEY, id TEXT, text TEXT")
    database.do("INSERT INTO tickets VALUES (0, '0', 'not this one')")
    query = "SELECT n AS number, id, text, '100%:x' AS note FROM tickets WHERE text LIKE 'text%';"
    source = database.source(None, query=query, cursor="number", key="number")
    check_contract(source, lambda rows: database.insert([{"n": int(row["id"]) + 1, **row} for row in rows]))
    first = source.read(None, 1).records[0]
    assert (first.origin, first.value["note"]) == ("query@1", "100%:x")


def test_rows_are_records_with_origins(lite):
    lite.make("id INTEGER PRIMARY KEY, text TEXT, at TIME, score REAL, label TEXT")
    lite.insert([{"id": 7, "text": "é", "at": EARLY, "score": 0.5, "label": None}])
    chunk = lite.source(cursor="at").read(None, 10)
    value = {"id": 7, "text": "é", "at": EARLY, "score": 0.5, "label": None}
    assert [(record.origin, record.value) for record in chunk.records] == [(f"tickets@{EARLY}/7", value)]
    assert chunk.offset.pop("seen")[0][:2] == [EARLY, 7]
    assert chunk.offset == {"table": "tickets", "by": ["at", "id"], "after": [EARLY, 7]}


def test_bad_values_carry_their_reason(lite):
    lite.make("id INTEGER PRIMARY KEY, text")
    lite.do(
        "INSERT INTO tickets VALUES (1, 'good')",
        "INSERT INTO tickets VALUES (2, x'00ff')",
        "INSERT INTO tickets VALUES (3, CAST(x'ff' AS TEXT))",
        "INSERT INTO tickets VALUES (4, 9e999)",
    )
    good, *bad = lite.source(cursor="id").read(None, 10).records
    assert good.value == {"id": 1, "text": "good"}
    assert [record.value for record in bad] == [None] * 3
    assert [record.error for record in bad] == [
        *["column text: a value of type bytes has no JSON equivalent"] * 2,
        "column text: inf is not a JSON number",
    ]
    assert "00" in bad[0].raw


def test_ties_at_the_border_of_a_chunk(database):
    database.make("id INTEGER PRIMARY KEY, text TEXT, day INTEGER")
    database.insert([{"id": i, "text": f"text {i}", "day": i // 7} for i in range(20)])
    source = database.source(cursor="day")
    first = source.read(None, 3)
    database.insert([{"id": 100, "text": "same day, later", "day": 0}])
    rest, _ = read_all(source, first.offset, 2)
    assert texts([*first.records, *rest]) == [*expected(0, 7), "same day, later", *expected(7, 20)]


def test_rows_that_cannot_be_told_apart_are_refused(lite):
    lite.make("text TEXT, day INTEGER")
    lite.insert([{"text": f"text {i}", "day": i // 2} for i in range(6)])
    with pytest.raises(SourceError, match="has no single-column primary key: pass as key a column"):
        lite.source(cursor="day").read(None, 5)
    for limit in (1, 2, 10):
        with pytest.raises(SourceError, match=r"several rows with the same day and day \(0 and 0\): pass a key"):
            lite.source(cursor="day", key="day").read(None, limit)
    assert texts(lite.source(cursor="day", key="text").read(None, 10).records) == expected(0, 6)


def test_rows_without_a_cursor_are_refused_unless_a_query_leaves_them_out(database):
    database.make("id INTEGER PRIMARY KEY, text TEXT, closed INTEGER")
    database.insert([{"id": i, "text": f"text {i}", "closed": i} for i in range(5)])
    database.insert([{"id": 5, "text": "open", "closed": None}])
    source = database.source(cursor="closed")
    chunk = source.read(None, 3)
    with pytest.raises(SourceError, match="1 rows without a usable closed or id, which have no place"):
        source.read(chunk.offset, 3)
    query = "SELECT * FROM tickets WHERE closed IS NOT NULL"
    waiting = database.source(None, query=query, cursor="closed", key="id")
    records, offset = read_all(waiting)
    assert texts(records) == expected(0, 5)
    database.do("UPDATE tickets SET closed = 9 WHERE id = 5")
    assert texts(waiting.read(offset, 3).records) == ["open"]


def test_values_that_have_no_order_are_refused(lite):
    lite.make("id INTEGER PRIMARY KEY, at REAL")
    lite.insert([{"id": 1, "at": 0.1}])
    with pytest.raises(SourceError, match="order of at, which holds a value of type float: it must hold integers"):
        lite.source(cursor="at").read(None, 5)


def test_delay_makes_young_rows_and_all_after_them_wait(database):
    database.make("id INTEGER PRIMARY KEY, text TEXT, at TIME DEFAULT CURRENT_TIMESTAMP")
    database.do(*(f"INSERT INTO tickets VALUES ({i}, 'text {i}', '2020-01-01 00:00:0{i}')" for i in range(4)))
    database.do("INSERT INTO tickets (id, text) VALUES (4, 'text 4')")
    database.do("INSERT INTO tickets VALUES (5, 'text 5', '2020-01-01 00:00:05')")
    by_time, by_number = database.source(cursor="at", delay=3600), database.source(cursor="id", delay=3600, time="at")
    records, offset = read_all(by_number, limit=3)
    assert texts(records) == expected(0, 4)  # 5 is old, but comes after 4
    assert texts(read_all(by_time, limit=3)[0]) == [*expected(0, 4), "text 5"]
    database.do("UPDATE tickets SET at = '2020-01-01 00:00:04' WHERE id = 4")  # an hour later
    assert texts(read_all(by_number, offset)[0]) == expected(4, 6)


def test_delay_needs_a_time(lite):
    lite.make("id INTEGER PRIMARY KEY, text TEXT, at TIME")
    lite.insert([{"id": 1, "text": "a", "at": "no time"}])
    with pytest.raises(SourceError, match="delay needs a time, but id holds numbers"):
        lite.source(cursor="id", delay=5).read(None, 1)
    with pytest.raises(SourceError, match="1 rows without a usable at or id"):
        lite.source(cursor="id", delay=5, time="at").read(None, 5)


def test_a_transaction_that_commits_late_is_not_lost(postgres):
    database = Database(postgres.url)
    database.make("id SERIAL PRIMARY KEY, text TEXT, at TIME DEFAULT CURRENT_TIMESTAMP")
    careless = database.source(cursor="id")
    careful = database.source(cursor="id", delay=3600, time="at")
    with database.engine.connect() as late:
        late.execute(sa.text("INSERT INTO tickets (text) VALUES ('late')"))
        database.do("INSERT INTO tickets (text) VALUES ('early')")
        seen, careless_offset = read_all(careless)
        waiting, careful_offset = read_all(careful)
        late.commit()
    assert (texts(seen), texts(waiting)) == (["early"], [])
    assert careless.read(careless_offset, 5).records == []  # what the docstring warns of
    database.do("UPDATE tickets SET at = at - INTERVAL '2 hours'")
    assert texts(read_all(careful, careful_offset)[0]) == ["late", "early"]


def test_types_of_postgres(postgres):
    database = Database(postgres.url)
    database.make("id UUID PRIMARY KEY, at TIME, price NUMERIC, day DATE, tags TEXT[], facts JSONB, data BYTEA")
    uuid = "00000000-0000-0000-0000-00000000000"
    for i in range(4):  # the last hour of summer time twice: the order is not that of the clock on the wall
        at = f"2026-10-25 0{i // 2}:30:00.123456+00"
        row = f"'{uuid}{i}', '{at}', 1.10, '2026-01-31', '{{a,b}}', '{{\"x\": [1, null]}}', NULL"
        database.do(f"INSERT INTO tickets VALUES ({row})".replace(":", "\\:"))
    source = database.source(cursor="at")
    records, offset = read_all(source, limit=1)
    assert [record.value["id"] for record in records] == [f"{uuid}{i}" for i in range(4)]
    facts = {"price": "1.10", "day": "2026-01-31", "tags": ["a", "b"], "facts": {"x": [1, None]}, "data": None}
    assert records[0].value == {"id": f"{uuid}0", "at": "2026-10-25T02:30:00.123456+02:00", **facts}
    assert offset["after"] == [{"datetime": "2026-10-25T02:30:00.123456+01:00"}, {"uuid": f"{uuid}3"}]
    for cursor in ("day", "price"):
        assert len(read_all(database.source(cursor=cursor), limit=3)[0]) == 4
    database.do(f"UPDATE tickets SET data = '\\x00', price = 'NaN' WHERE id = '{uuid}3'")
    assert "bytes" in source.read(None, 10).records[3].error


def test_server_killed_and_restarted(postgres):
    database = Database(postgres.url)
    database.make("id SERIAL PRIMARY KEY, text TEXT")
    database.insert([{"text": f"text {i}"} for i in range(30)])
    source = database.source(cursor="id")
    first = source.read(None, 10)
    slow = "SELECT id, text, (SELECT count(*) FROM generate_series(1, 1000000000)) AS n FROM tickets"
    hanging = database.source(None, query=slow, cursor="id", key="id")
    killer = threading.Timer(1.0, postgres.kill)
    killer.start()
    with pytest.raises(SourceError, match=r"a query of postgresql.* cannot be read: .*reading resumes from the same"):
        hanging.read(None, 10)
    killer.join()
    with pytest.raises(SourceError, match=r"(?s)the table tickets .* cannot be read: .*connection"):
        source.read(first.offset, 10)
    postgres.start()
    rest, _ = read_all(source, first.offset, 7)
    assert texts([*first.records, *rest]) == expected(0, 30)


def test_nothing_is_written(database, tmp_path):
    database.make("id INTEGER PRIMARY KEY, text TEXT")
    database.insert([{"id": 1, "text": "a"}])
    source = database.source(cursor="id")
    with source._connect() as connection, pytest.raises(sa.exc.SQLAlchemyError, match=r"read-?only"):
        connection.execute(sa.text("DELETE FROM tickets"))
    absent = tmp_path / "absent.db"
    with pytest.raises(SourceError, match=r"absent.db cannot be read: the file does not exist"):
        SQLSource(f"sqlite:///{absent}", table="tickets", cursor="id").read(None, 1)
    assert not absent.exists()


def test_missing_tables_and_columns_and_foreign_offsets(database):
    database.make("id INTEGER PRIMARY KEY, text TEXT")
    with pytest.raises(SourceError, match=r"the table nothing of .* the table does not exist"):
        database.source("nothing", cursor="id").read(None, 5)
    for options in ({"cursor": "number"}, {"cursor": "id", "key": "number"}, {"cursor": "id", "columns": ["number"]}):
        with pytest.raises(SourceError, match="has no column 'number'; it has id, text"):
            database.source(**options).read(None, 5)
    if not database.url.startswith("sqlite"):  # which makes the names differ
        twice = "SELECT a.id, b.id FROM tickets a JOIN tickets b ON a.id = b.id"
        with pytest.raises(SourceError, match="several columns named id"):
            database.source(None, query=twice, cursor="id", key="id").read(None, 5)
    with pytest.raises(SourceError, match=r"a query of .* cannot be read: .*nothing"):
        database.source(None, query="SELECT * FROM nothing", cursor="id", key="id").read(None, 5)
    offset = database.source(cursor="id").read(None, 5).offset
    with pytest.raises(
        SourceError, match="belongs to tickets by id and id, but the source reads tickets by id and text"
    ):
        database.source(cursor="id", key="text").read(offset, 5)
    for bad in ({"next": {}}, {**offset, "after": [1]}, {**offset, "after": [{"datetime": "x"}, 1]}):
        with pytest.raises(SourceError, match="is not an offset of a SQL table"):
            database.source(cursor="id").read(bad, 5)


def test_a_locked_database_is_an_error_and_reading_goes_on(lite):
    lite.make("id INTEGER PRIMARY KEY, text TEXT")
    lite.insert([{"id": 1, "text": "a"}])
    source = SQLSource(f"{lite.url}?timeout=0.1", table="tickets", cursor="id")
    writer = sqlite3.connect(Path(lite.engine.url.database), isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SourceError, match="database is locked"):
        source.read(None, 5)
    writer.execute("ROLLBACK")
    writer.close()
    assert texts(source.read(None, 5).records) == ["a"]


def test_passwords_stay_hidden(monkeypatch):
    pytest.importorskip("psycopg", reason='psycopg is not installed (pip install "psycopg[binary]")')
    monkeypatch.setenv("DATABASE_PASSWORD", "top-secret")
    url = "postgresql+psycopg://user:${DATABASE_PASSWORD}@127.0.0.1:1/tickets"
    source = SQLSource(url, table="tickets", cursor="id")
    with pytest.raises(SourceError, match=r"127.0.0.1:1/tickets cannot be read") as error:
        source.read(None, 5)
    assert "top-secret" not in f"{error.value} {source} {source!r}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"table": None}, "pass either a table or a query"),
        ({"query": "SELECT 1"}, "pass either a table or a query"),
        ({"table": None, "query": "SELECT 1"}, "a query needs a key"),
        ({"cursor": ""}, "cursor must not be empty"),
        ({"columns": []}, "columns must name at least one column"),
        ({"delay": -1}, "delay must not be negative, got -1"),
        ({"time": "at"}, "time is used only with delay"),
        ({"url": "tickets.db"}, "not the URL of a database: tickets.db"),
        ({"url": "nosuch://user:top-secret@host/x"}, r"not the URL of a database: nosuch://user:\*\*\*@host/x"),
        ({"url": "sqlite://user:top@secret@host/x"}, r"not the URL of a database: sqlite://user:\*\*\*@host/x"),
        ({"url": "sqlite:///${NOT_SET_ANYWHERE}"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_bad_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason) as error:
        SQLSource(**{"url": "sqlite:///x.db", "table": "tickets", "cursor": "id", **arguments})
    assert "secret" not in str(error.value)


def test_an_offset_is_json(lite):
    lite.make("id INTEGER PRIMARY KEY, text TEXT")
    source = lite.source(cursor="id")
    assert source.read(None, 5).offset == {"table": "tickets", "by": ["id", "id"], "after": None}
    lite.insert([{"id": 2**60, "text": "a"}])
    offset = json.loads(json.dumps(source.read(None, 5).offset))
    assert source.read(offset, 5).records == []


def tickets(start, stop, text="text"):
    return [{"id": number, "text": f"{text} {number}", "label": "a"} for number in range(start, stop)]


@pytest.fixture
def read_once(database):
    """A database of which ten rows have been read, and the offset."""
    database.make("id INTEGER PRIMARY KEY, text TEXT, label TEXT")
    database.insert(tickets(1, 11))
    return database, read_all(database.source(cursor="id"), limit=3)[1]


@pytest.mark.parametrize("n", [5, 10, 14])
def test_a_table_that_starts_again_is_an_error(read_once, n):
    """It has fewer rows than before, as many, or more."""
    database, offset = read_once
    database.do("DELETE FROM tickets")
    assert database.source(cursor="id").read(offset, 10).records == []
    database.insert(tickets(1, n + 1, "another"))
    source = database.source(cursor="id")
    with pytest.raises(
        SourceError, match=r"the table tickets .* is not the one that was read.* from the offset {"
    ) as e:
        source.read(offset, 10)
    again, after = map(json.loads, re.findall(r"the offset ({.*?})(?:,|$)", str(e.value)))
    assert texts(read_all(source, again)[0]) == [f"another {number}" for number in range(1, n + 1)]
    assert texts(read_all(source, after)[0]) == [f"another {number}" for number in range(11, n + 1)]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tickets SET label = 'b'",
        "UPDATE tickets SET text = 'corrected' WHERE id >= 8",
        "DELETE FROM tickets",
        "DELETE FROM tickets WHERE id < 9",
        "DELETE FROM tickets WHERE id = 10",
        "ALTER TABLE tickets ADD COLUMN note TEXT DEFAULT 'a note that is longer than the text'",
    ],
)
def test_what_may_happen_to_rows_that_were_read(read_once, change):
    database, offset = read_once
    database.do(change)
    database.insert(tickets(11, 13))
    assert texts(read_all(database.source(cursor="id"), offset, 1)[0]) == ["text 11", "text 12"]


def test_other_columns_may_be_asked_for(read_once):
    database, offset = read_once
    database.insert(tickets(11, 12))
    records, later = read_all(database.source(cursor="id", columns=["label"]), offset)
    assert [record.value for record in records] == [{"label": "a"}]
    database.insert(tickets(12, 13))
    assert texts(database.source(cursor="id").read(later, 10).records) == ["text 12"]


def test_a_column_added_while_the_source_is_open_is_read(read_once):
    database, offset = read_once
    source = database.source(cursor="id")
    assert source.read(offset, 10).records == []
    database.do("ALTER TABLE tickets ADD COLUMN note TEXT", "INSERT INTO tickets VALUES (11, 'text 11', 'a', 'new')")
    assert source.read(offset, 10).records[0].value["note"] == "new"


def test_offsets_without_fingerprints_are_read_on(read_once):
    database, offset = read_once
    assert len(offset.pop("seen")) == 4
    database.insert(tickets(11, 12))
    source = database.source(cursor="id")
    assert texts(source.read(offset, 10).records) == ["text 11"]
    for bad in ([1], [[1, 2]], [[{"x": 1}, 2, "a"]]):
        with pytest.raises(SourceError, match="not an offset of a SQL table"):
            source.read({**offset, "seen": bad}, 10)


@pytest.mark.parametrize("kind", ["TIME", "DATE", "TEXT"])
@pytest.mark.parametrize("limit", [1, 10])
def test_one_row_in_the_future_does_not_move_the_cursor_past_all_others(database, kind, limit):
    database.make(f"id INTEGER PRIMARY KEY, text TEXT, at {kind}")
    database.insert([{"id": 1, "text": "now", "at": "2026-01-01"}, {"id": 2, "text": "far", "at": "2099-12-31"}])
    source = database.source(cursor="at")
    with pytest.warns(UserWarning, match="dated in the future, the first at 2099-12-31.* correct their at"):
        records, offset = read_all(source, limit=limit)
    assert texts(records) == ["now"]
    database.insert([{"id": 3, "text": "later", "at": "2026-01-02"}])
    records, offset = read_all(source, offset, limit)
    assert texts(records) == ["later"]
    database.do("UPDATE tickets SET at = '2026-01-03' WHERE id = 2")
    assert texts(read_all(source, offset, limit)[0]) == ["far"]
