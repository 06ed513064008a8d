"""Classes of pending records that production does not know, and that need not wait for the next update."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from evertune.live.backlog import Backlog
from evertune.live.records import Records
from evertune.live.setup import Setup
from evertune.sources.base import Row
from evertune.utils.files import write_atomically
from evertune.utils.typed_json import read_json

_REFUSED = "imprinting.json"

logger = logging.getLogger("evertune.live")


@dataclass
class _Refused:
    """The content of the file that says which classes were refused.

    Args:
        production: Number of the version that was in production.
        records: Number of the records of each class.
    """

    production: int
    records: dict[str, int]


def new_classes(setup: Setup, backlog: Backlog) -> dict[str, list[Row]]:
    """The classes that production can be taught without training, with their pending records that are not held out.

    These are the classes that it does not know and of which enough records wait (``imprint_after`` of
    :class:`~evertune.live.settings.UpdateSettings`). A class with which a version was refused needs twice as many as
    then. There are none before the first version, until what a rollback gave up is in quarantine, and while records
    wait with which an update of this production was refused or stopped: they may be what is wrong.
    """
    least, production = setup.settings.imprint_after, setup.registry.production
    if least is None or production is None or setup.registry.given_up:
        return {}
    segments = backlog.pending(production)
    if not segments or backlog.attempted(production) >= segments[0].number:
        return {}
    records, refused = Records(setup, segments, production), _refused(setup, production.number)

    def enough(rows: Iterable[Row]) -> dict[str, list[Row]]:
        waiting: defaultdict[str, list[Row]] = defaultdict(list)
        for row in rows:
            for name in setup.task.label_names(setup.label_of(row)):
                if name not in production.manifest.classes:
                    waiting[name].append(row)
        return {name: some for name, some in waiting.items() if len(some) >= max(least, 2 * refused.get(name, 0))}

    # A watch asks in every round: what was held out before is read only if there may be such a class.
    return enough(records.split.train) if enough(records.rows) else {}


def reason_to_imprint(setup: Setup, backlog: Backlog) -> str | None:
    """Why production is taught classes without training now, as a message; None if it is not."""
    found = new_classes(setup, backlog)
    return words_of(found) if found else None


def words_of(classes: Mapping[str, Sequence[Row]]) -> str:
    """The classes with the numbers of their records, as a message."""
    named = ", ".join(f"{name!r} ({len(rows)} records)" for name, rows in classes.items())
    return f"new classes, imprinted until an update trains them: {named}"


def note_refused(setup: Setup, production: int, classes: Mapping[str, Sequence[Row]]) -> None:
    """Note that a version with these classes was refused."""
    counts = _refused(setup, production) | {name: len(rows) for name, rows in classes.items()}
    setup.staging.mkdir(parents=True, exist_ok=True)
    write_atomically(setup.staging / _REFUSED, json.dumps(asdict(_Refused(production, counts))).encode())


def _refused(setup: Setup, production: int) -> dict[str, int]:
    path = setup.staging / _REFUSED
    if not path.is_file():
        return {}
    try:
        found = read_json(_Refused, path.read_bytes())
    except ValueError as error:
        logger.warning("%s is damaged (%s): what was refused is tried again", path, error)
        return {}
    return found.records if found.production == production else {}
