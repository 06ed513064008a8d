"""Records from a table of a SQL database."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID
from warnings import warn

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError
from evertune.sources.formats import digest
from evertune.sources.json import plain
from evertune.utils.extras import library
from evertune.utils.secrets import fill_in, without_secrets

if TYPE_CHECKING:
    from sqlalchemy import Connection

_Place = tuple[Any, Any]  # the cursor and the key of a row
_Seen = tuple[_Place, str]  # a row that was read, and its fingerprint
_SEEN = 4  # rows whose fingerprints an offset holds: enough that editing one of them does not look like another table

_AHEAD = timedelta(days=1)  # allows for clocks and time zones that are set wrong
_KINDS = {int: None, str: None, datetime: "datetime", date: "date", Decimal: "decimal", UUID: "uuid"}
_READ: dict[str, Callable[[str], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "decimal": Decimal,
    "uuid": UUID,
}
"""How cursor and key values without a JSON type are parsed from their text in the offset."""


class SQLSource(Source):
    """Reads the rows of a table, or of a query, in the order of a column that only grows: its cursor.

    Each row is read once. Later changes to it are not seen, unless they increase its cursor (as with ``updated_at``):
    it is then read again. Rows with the same cursor are ordered by ``key``. A row without a cursor or a key has no
    place in this order: reading to the end of the table is an error until it has one, or a ``query`` excludes it.

    **Transactions that commit late.** A row gets its number or time when it is inserted, but becomes visible when its
    transaction commits: it may appear behind the cursor and would never be read. Set ``delay`` to more seconds than the
    longest writing transaction takes: rows younger than that, and all rows after them, are left for later. Without a
    delay, no row is lost only if a single transaction writes at a time.

    The source never writes: the transaction is read-only where the database supports it (PostgreSQL, SQLite), and is
    always rolled back.

    Rows whose cursor is a time more than a day in the future are left until then, with a warning: after them, all rows
    of today would be behind the cursor.

    **Tables that start again.** A table that was emptied or restored, and assigns cursors that have been read already,
    is an error. The offset has fingerprints of the last rows that were read, and one of these rows must still have its
    longest text, or, if all of them are gone, no older row may be left (rows may be deleted once they have been read,
    the oldest first). Columns may be added at any time.

    Args:
        url: URL of SQLAlchemy, such as ``"postgresql+psycopg://user:${PASSWORD}@host/name"``; ``${NAME}`` is replaced
            by the environment variable.
        table: Table or view to read, ``"name"`` or ``"schema.name"``.
        query: SELECT statement to read instead of a table.
        cursor: Column that defines the order: integers, times, or text that sorts (such as a ULID).
        key: Column that, together with the cursor, identifies a row; the cursor itself if it is unique. Default: the
            primary key of the table.
        columns: Columns of a record; None for all. Times become ISO 8601, decimals (exactly) and UUIDs strings; a row
            with a value that has no JSON equivalent becomes a record with an ``error``.
        delay: Minimum age of a row in seconds, by the clock of the database.
        time: Column with the insertion time of a row, for ``delay``; by default the cursor, if it is a time. In
            SQLite it must be text in UTC (``CURRENT_TIMESTAMP``), elsewhere a timestamp as the database writes it.

    Raises:
        ValueError: If an argument is invalid.
        ModuleNotFoundError: If ``sqlalchemy`` or the database's driver is not installed.

    Example:
        >>> source = SQLSource("sqlite:///tickets.db", table="tickets", cursor="created_at", delay=60)
        >>> print(source)
        the table tickets of sqlite:///tickets.db
    """

    def __init__(
        self,
        url: str,
        table: str | None = None,
        query: str | None = None,
        *,
        cursor: str,
        key: str | None = None,
        columns: Sequence[str] | None = None,
        delay: float = 0.0,
        time: str | None = None,
    ) -> None:
        if bool(table) == bool(query):
            raise ValueError("pass either a table or a query")
        if not cursor:
            raise ValueError("cursor must not be empty")
        if query and not key:
            raise ValueError("a query needs a key: a column that distinguishes rows with the same cursor")
        if columns is not None and not columns:
            raise ValueError("columns must name at least one column; None takes all of them")
        if delay < 0:
            raise ValueError(f"delay must not be negative, got {delay}")
        if time and not delay:
            raise ValueError("time is used only with delay, which is 0")
        self.table, self.cursor, self.key, self.columns = table, cursor, key or "", columns  # no key: look it up
        self.delay, self.time = delay, time or cursor
        self._query = (query or "").strip().rstrip(";")
        self._sa = library("sqlalchemy", "sql")
        url = fill_in(url)
        self._place = without_secrets(url)
        try:
            self._engine = self._sa.create_engine(
                url,
                poolclass=self._sa.NullPool,  # reads may be hours apart
                execution_options={"postgresql_readonly": True},
            )
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: install the driver of {self._place}", name=error.name) from None
        except (self._sa.exc.ArgumentError, ValueError):
            raise ValueError(
                f"not the URL of a database: {self._place}; special characters of its password must be percent-encoded"
            ) from None
        if "@" in (self._engine.url.host or ""):
            raise ValueError("not the URL of a database: percent-encode the @ in its password as %40")
        self._rows: Any = None
        self._may_be_null: set[str] = set()
        self._left: _Place | None = None  # the row in the future that a warning has named

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        try:
            with self._connect() as connection:
                self._rows = self._look(connection)  # each time: columns may have been added
                after = None if offset is None else self._parse(offset)
                seen = [] if offset is None else self._parse_seen(offset)
                self._check_same(connection, seen)
                rows = [dict(row) for row in connection.execute(self._page(connection, after, limit)).mappings()]
                if len(rows) <= limit:
                    self._check_placed(connection)
        except self._sa.exc.SQLAlchemyError as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".")
            raise SourceError(
                f"{self} cannot be read: {reason}. Once that is fixed, reading resumes from the same offset"
            ) from error
        places = self._due([self._place_of(row) for row in rows])
        rows = rows[: len(places)]
        for place, following in itertools.pairwise(places):
            if place == following:
                raise SourceError(
                    f"{self} has several rows with the same {self.cursor} and {self.key} "
                    f"({' and '.join(map(str, place))}): pass a key that distinguishes them"
                )
        records = [self._incoming(row, place) for row, place in zip(rows[:limit], places, strict=False)]
        seen += [(place, self._fingerprint(row)) for row, place in zip(rows[:limit], places, strict=False)]
        return Chunk(records, self._offset(places[len(records) - 1] if records else after, seen[-_SEEN:]))

    def _due(self, places: list[_Place]) -> list[_Place]:
        """The places before the first that is dated in the future: after it, all rows of today would be behind."""
        n_due = next((number for number, (cursor, _) in enumerate(places) if _in_future(cursor)), len(places))
        if n_due < len(places) and places[n_due] != self._left:
            self._left = places[n_due]
            warn(
                f"{self} has rows dated in the future, the first at {places[n_due][0]}: they are left until then, as "
                f"rows of today would be behind the cursor; correct their {self.cursor}, or exclude them with a query",
                stacklevel=3,
            )
        return places[:n_due]

    def close(self) -> None:
        self._engine.dispose()

    def __str__(self) -> str:
        return f"{f'the table {self.table}' if self.table else 'a query'} of {self._place}"

    def _connect(self) -> Connection:
        sqlite = self._engine.dialect.name == "sqlite"
        database = self._engine.url.database
        if sqlite and database and not database.startswith("file:") and not Path(database).exists():
            raise SourceError(f"{self} cannot be read: the file does not exist")  # connecting would create it
        connection: Connection = self._engine.connect()
        if sqlite:
            connection.exec_driver_sql("PRAGMA query_only = ON")
            connection.connection.dbapi_connection.text_factory = _text  # type: ignore[union-attr]
        return connection

    def _look(self, connection: Connection) -> Any:
        """The table or subquery to select from, with the columns that the database reports."""
        if self.table:
            rows = self._look_at_table(connection, self.table)
        else:
            query = self._sa.text(self._query.replace(":", "\\:"))  # a colon must not begin a bind parameter
            everything = self._sa.select(self._sa.text("*")).select_from(query.columns().subquery("records"))
            names = list(connection.execute(everything.limit(0)).keys())
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise SourceError(f"{self} has several columns named {', '.join(twice)}: rename them in the query")
            rows = query.columns(*map(self._sa.column, names)).subquery("records")
            self._may_be_null = set(names)
        for name in (self.cursor, self.key, self.time, *(self.columns or ())):
            if name not in rows.c:
                raise SourceError(f"{self} has no column {name!r}; it has {', '.join(rows.c.keys())}")
        return rows

    def _look_at_table(self, connection: Connection, table: str) -> Any:
        *schema, name = table.rsplit(".", 1)
        inspector = self._sa.inspect(connection)
        try:
            columns = inspector.get_columns(name, *schema)
            primary = inspector.get_pk_constraint(name, *schema)["constrained_columns"]
        except self._sa.exc.NoSuchTableError:
            raise SourceError(f"{self} cannot be read: the table does not exist") from None
        if not self.key:
            if len(primary) != 1:
                raise SourceError(
                    f"{self} has no single-column primary key: pass as key a column that distinguishes rows with the "
                    f"same {self.cursor}"
                )
            self.key = primary[0]
        self._may_be_null = {column["name"] for column in columns if column["nullable"]}
        names = [self._sa.column(column["name"]) for column in columns]
        return self._sa.table(name, *names, schema=schema[0] if schema else None)

    def _page(self, connection: Connection, after: _Place | None, limit: int) -> Any:
        """Query for the next ``limit`` rows, and one more to check that it differs in cursor or key from the last."""
        select, either, column = self._sa.select, self._sa.or_, self._rows.c
        cursor, key = column[self.cursor], column[self.key]
        names = dict.fromkeys([*(self.columns or column.keys()), self.cursor, self.key])
        page = select(*(column[name] for name in names)).where(cursor.is_not(None), key.is_not(None))
        if after is not None:
            last, last_key = map(self._bound, after)
            # The first condition is redundant, but lets the database use an index on the cursor.
            page = page.where(cursor >= last, either(cursor > last, key > last_key))
        if self.delay:  # in the same statement, so that no row is committed in between
            first_young = select(self._sa.func.min(cursor)).where(self._young(connection)).scalar_subquery()
            page = page.where(either(first_young.is_(None), cursor < first_young))
        return page.order_by(cursor, key).limit(limit + 1)

    def _young(self, connection: Connection) -> Any:
        """Whether a row is younger than ``delay``."""
        time = self._rows.c[self.time]
        if self._engine.dialect.name == "sqlite":
            return self._sa.func.julianday(time) > self._sa.func.julianday("now") - self.delay / 86400
        now = connection.execute(self._sa.select(self._sa.func.current_timestamp())).scalar_one()
        return time > self._bound(now - timedelta(seconds=self.delay))

    def _check_placed(self, connection: Connection) -> None:
        """Check that every row has a place in the order.

        Raises:
            SourceError: If one has none.
        """
        column, needed = self._rows.c, {self.cursor, self.key}
        missing = [column[name].is_(None) for name in needed & self._may_be_null]
        if self.delay:
            needed.add(self.time)
            sqlite = self._engine.dialect.name == "sqlite"
            missing.append((self._sa.func.julianday(column[self.time]) if sqlite else column[self.time]).is_(None))
        if not missing:
            return
        count = self._sa.select(self._sa.func.count()).select_from(self._rows).where(self._sa.or_(*missing))
        if rows := connection.execute(count).scalar_one():
            raise SourceError(
                f"{self} has {rows} rows without a usable {' or '.join(sorted(needed))}, which have no place in its "
                "order: fill it in, or exclude them with a query (WHERE ... IS NOT NULL)"
            )

    def _check_same(self, connection: Connection, seen: Sequence[_Seen]) -> None:
        """Check that the table is the one that was read, by its rows that were read last.

        Raises:
            SourceError: If it is not.
        """
        if not seen:
            return
        column = self._rows.c
        cursor, key = column[self.cursor], column[self.key]
        own = [self._sa.and_(cursor == self._bound(at), key == self._bound(name)) for (at, name), _ in seen]
        found = self._sa.select(*column).where(self._sa.or_(*own))  # all columns: the setting may have changed
        marks = {_written(place): mark for place, mark in seen}
        there = [dict(row) for row in connection.execute(found).mappings()]
        if any(marks.get(_written(self._place_of(row))) in self._fingerprints(row) for row in there):
            return
        if there:
            trouble = f"none of the last {len(seen)} rows that were read is as it was"
        elif (
            self.table
            and connection.execute(self._sa.select(cursor).where(cursor < self._bound(seen[0][0][0])).limit(1)).first()
        ):
            trouble = f"the last {len(seen)} rows that were read are gone, and older ones are there"
        else:
            return
        last = seen[-1][0]
        raise SourceError(
            f"{self} is not the one that was read: {trouble}. It was emptied, replaced or restored. Undo that, or read "
            f"all that it holds now from the offset {json.dumps(self._offset(None))}, or what comes after "
            f"{'/'.join(map(str, plain(last)))} from the offset {json.dumps(self._offset(last))}"
        )

    def _fingerprint(self, row: dict[str, Any]) -> str:
        """Hash of the longest text of a row, which is its least likely value to change or to recur."""
        return max(self._fingerprints(row).items(), key=lambda mark: (mark[1], mark[0]))[0]

    def _fingerprints(self, row: dict[str, Any]) -> dict[str, int]:
        """Hashes of the values of a row, with their lengths as text."""
        values = [str(value) for name, value in row.items() if name not in (self.cursor, self.key)]
        return {digest(text.encode(errors="replace"), 6): len(text) for text in values or ["-"]}

    def _place_of(self, row: dict[str, Any]) -> _Place:
        cursor, key = row[self.cursor], row[self.key]
        for name, value in ((self.cursor, cursor), (self.key, key)):
            if type(value) not in _KINDS:
                raise SourceError(
                    f"{self} cannot be read in the order of {name}, which holds a value of type "
                    f"{type(value).__name__}: it must hold integers, times or text"
                )
        if self.delay and self.time == self.cursor and isinstance(cursor, int):
            raise SourceError(f"{self}: delay needs a time, but {self.cursor} holds numbers: pass a column as time")
        return cursor, key

    def _incoming(self, row: dict[str, Any], place: _Place) -> Incoming:
        where = plain(place[:1] if self.key == self.cursor else place)
        origin = f"{self.table or 'query'}@{'/'.join(map(str, where))}"
        value = {}
        for name in self.columns or row:
            try:
                value[name] = plain(row[name])
            except ValueError as error:
                return Incoming(origin, None, f"column {name}: {error}", str(row))
        return Incoming(origin, value)

    def _bound(self, value: Any) -> Any:
        """A bound value of the exact type of the column that it is compared with."""
        zoned = isinstance(value, datetime) and value.tzinfo is not None
        return self._sa.literal(value, self._sa.DateTime(timezone=True) if zoned else None)

    def _offset(self, place: _Place | None, seen: Sequence[_Seen] = ()) -> Offset:
        after = None if place is None else [_encoded(value) for value in place]
        offset: Offset = {"table": self.table or "query", "by": [self.cursor, self.key], "after": after}
        if seen:
            offset["seen"] = [[*map(_encoded, row), mark] for row, mark in seen]
        return offset

    def _parse(self, offset: Offset) -> _Place | None:
        try:
            table, by, after = offset["table"], list(offset["by"]), offset["after"]
            place = None if after is None else (_decoded(after[0]), _decoded(after[1]))
        except (KeyError, TypeError, ValueError, ArithmeticError, IndexError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a SQL table") from None
        mine = self.table or "query", [self.cursor, self.key]
        if (table, by) != mine:
            raise SourceError(
                f"the offset belongs to {table} by {' and '.join(map(str, by))}, but the source reads {mine[0]} by "
                f"{' and '.join(map(str, mine[1]))}"
            )
        return place

    def _parse_seen(self, offset: Offset) -> list[_Seen]:
        try:
            return [((_decoded(cursor), _decoded(key)), str(mark)) for cursor, key, mark in offset.get("seen", [])]
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a SQL table") from None


def _in_future(cursor: Any) -> bool:
    """Whether a cursor is a time, or the text of one, more than a day from now."""
    try:
        time = datetime.fromisoformat(str(cursor)) if isinstance(cursor, str | date) else None
    except ValueError:
        return False
    if time is None:
        return False
    return time.replace(tzinfo=time.tzinfo or UTC) > datetime.now(UTC) + _AHEAD


def _encoded(value: Any) -> Any:
    """JSON of a cursor or key value: numbers and text unchanged, anything else with the name of its type."""
    kind = _KINDS[type(value)]
    return value if kind is None else {kind: plain(value)}


def _written(place: _Place) -> str:
    """A place as text: times that are equal in the database are not always equal in Python."""
    return json.dumps([_encoded(value) for value in place])


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    return _READ[kind](text)


def _text(data: bytes) -> str | bytes:
    """Text of SQLite, which is not guaranteed to be UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
