"""One writer at a time: real processes that race, die, stop and wake up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from evertune.registry import lease as leases
from evertune.registry.lease import TOKEN, Lease, LeaseHeld, LeaseLost
from evertune.registry.store import RegistryError, Store

FORK = multiprocessing.get_context("fork")
NEVER = 1e6
"""A time to live in seconds that no test lives through."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lease of a parent, and in no mind to wait for a holder that runs."""
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setattr(leases, "_GRACE", 0.02)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "registry")


CHILDREN: list[Child] = []


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    while CHILDREN:
        CHILDREN.pop().end()


class Child:
    """A process that runs a function with a connection to this one."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.connection, theirs = FORK.Pipe()
        self.process: ForkProcess = FORK.Process(target=function, args=(theirs, *arguments), daemon=True)
        self.process.start()
        CHILDREN.append(self)

    def send(self, signal_number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal_number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def hold(connection: Connection, root: str, ttl: float) -> None:
    """Take the lease, tell, and check it when asked."""
    with Lease(Store(root), "holder", ttl) as lease:
        connection.send(lease.number)
        while connection.recv() == "check":
            try:
                lease.check()
                connection.send("held")
            except LeaseLost as error:
                connection.send(str(error))
    connection.send("released")


def contend(connection: Connection, root: str) -> None:
    """Try once when told to, and keep what was taken until told again."""
    lease = Lease(Store(root), ttl=NEVER)
    while connection.recv():
        try:
            lease.__enter__()
            connection.send("taken")
        except LeaseHeld:
            connection.send("refused")
        connection.recv()
        lease.__exit__()
        connection.send("done")


def count(connection: Connection, root: str, times: int) -> None:
    """Add to a number in a file, which goes wrong when two do it at once."""
    file = Path(root).parent / "count"
    done = 0
    while done < times:
        try:
            with Lease(Store(root), ttl=NEVER):
                value = int(file.read_text())
                time.sleep(0.001)
                file.write_text(str(value + 1))
            done += 1
        except LeaseHeld:
            time.sleep(0.002)
    connection.send("done")


def test_taken_released_and_taken_again(store: Store) -> None:
    for number in (1, 2, 3):
        lease = Lease(store, "nightly")
        assert not lease.held
        with lease:
            assert lease.held
            assert lease.number == number
            lease.check()
        assert not lease.held
        with pytest.raises(LeaseLost):
            lease.check()
    assert store.list("lease") == ["3.json"]


def test_a_holder_that_is_alive_is_named(store: Store) -> None:
    words = rf"{store.root} is being written to by nightly \(process {os.getpid()} on .*\), since 20.*: wait until"
    with Lease(store, "nightly", ttl=NEVER) as lease, pytest.raises(LeaseHeld, match=words), Lease(store, ttl=NEVER):
        raise AssertionError
    with Lease(store) as lease:
        lease.check()


def test_the_lease_goes_when_the_work_fails(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(store, ttl=NEVER):
        raise KeyboardInterrupt
    with Lease(store, ttl=NEVER) as lease:
        assert lease.number == 2


def test_of_processes_that_start_at_once_one_gets_it(store: Store) -> None:
    children = [Child(contend, store.root) for _ in range(4)]
    for _ in range(15):
        for child in children:
            child.connection.send(True)
        answers = [child.connection.recv() for child in children]
        assert sorted(answers) == ["refused", "refused", "refused", "taken"]
        for child in children:
            child.connection.send(True)
        assert [child.connection.recv() for child in children] == ["done"] * 4


def test_no_two_processes_work_at_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    children = [Child(count, store.root, 10) for _ in range(3)]
    assert [child.connection.recv() for child in children] == ["done"] * 3
    assert (tmp_path / "count").read_text() == "30"


def test_a_killed_holder_is_followed_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: by the time to live, it would take days."""
    monkeypatch.setattr(leases, "_GRACE", 60.0)
    for number in (1, 3, 5):
        child = Child(hold, store.root, NEVER)
        assert child.connection.recv() == number
        child.send(signal.SIGKILL)
        with Lease(store, ttl=NEVER) as lease:  # it is a zombie still, as nobody has waited for it
            assert lease.number == number + 1


def test_another_process_of_the_same_number_is_not_the_holder(store: Store) -> None:
    """Process numbers come again: the start time tells them apart."""
    record = {"pid": os.getpid(), "started": 1, "host": leases._host(), "ttl": NEVER}
    store.write("lease/8.json", json.dumps(record).encode())
    with Lease(store, ttl=NEVER) as lease:
        assert lease.number == 9


def test_a_stopped_holder_loses_it_and_notices_when_it_wakes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(hold, store.root, 0.5)
    assert child.connection.recv() == 1
    child.connection.send("check")
    assert child.connection.recv() == "held"
    child.send(signal.SIGSTOP)
    monkeypatch.setattr(leases, "_GRACE", 60.0)
    with Lease(store, "second", ttl=NEVER) as lease:
        assert lease.number == 2
        child.connection.send("check")
        child.send(signal.SIGCONT)
        said = child.connection.recv()
        assert said.startswith(f"holder has lost its lease on {store.root}: it missed its heartbeats")
        assert f"second (process {os.getpid()} on" in said
        child.connection.send("leave")
        assert child.connection.recv() == "released"  # and what it did not hold any more is left alone
        lease.check()


def test_a_holder_elsewhere_that_gives_signs_of_life(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store, "elsewhere", ttl=2.0) as lease:
        monkeypatch.setattr(leases, "_host", lambda: "another/boot")
        for _ in range(3):
            with pytest.raises(LeaseHeld, match="elsewhere"), Lease(store, ttl=NEVER):
                raise AssertionError
        lease.check()


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_holder_elsewhere_that_is_silent(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path if kind == "disk" else f"memory://{uuid.uuid4().hex}")
    for number, content in (
        (3, b'{"host": "elsewhere/boot", "pid": 1, "started": 5, "ttl": 0.2}'),
        (7, b"{"),
        (9, b""),
    ):
        store.write(f"lease/{number}.json", content)  # the last two are damaged: a heart that stands still
        with Lease(store, ttl=0.2) as lease:
            assert lease.number == number + 1
            lease.check()
    assert store.list("lease") == ["10.json"]


@pytest.mark.parametrize("now", [-1e9, 0.0, 4e9])
def test_the_time_of_day_means_nothing(store: Store, now: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store, ttl=0.2) as lease:
        monkeypatch.setattr(time, "time", lambda: now)
        record = json.loads(store.read("lease/1.json"))
        for since in ("1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"):
            store.write("lease/1.json", json.dumps(record | {"since": since}).encode())
            lease.check()
            with pytest.raises(LeaseHeld), Lease(store, ttl=0.2):
                raise AssertionError


def test_a_child_works_under_the_lease_of_its_parent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store, "watch", ttl=NEVER) as parent:
        monkeypatch.setenv(TOKEN, parent.token)
        before = store.read("lease/1.json")
        with Lease(store, "update") as child:
            assert child.number == parent.number
            child.check()
        parent.check()  # it did not end with the child's work
        assert store.read("lease/1.json") == before
        child.__enter__()
        monkeypatch.delenv(TOKEN)
        store.write("lease/2.json", b'{"owner": "another"}')
        with pytest.raises(LeaseLost, match="update has lost its lease"):
            child.check()


def test_a_token_that_is_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store) as parent:
        token = parent.token
    monkeypatch.setenv(TOKEN, token + "x")
    with pytest.raises(LeaseLost, match=f"that {TOKEN} names is over.*run this again without {TOKEN}"), Lease(store):
        raise AssertionError


def test_a_heart_that_cannot_beat_tries_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True

    def write(name: str, data: bytes) -> None:
        if full:
            raise OSError(28, "the disk is full", name)
        Store.write(store, name, data)

    with Lease(store, ttl=0.05) as lease:
        monkeypatch.setattr(store, "write", write)
        while not caplog.messages:
            time.sleep(0.01)
        assert "the lease could not be renewed, and is tried again: [Errno 28] the disk is full" in caplog.messages[0]
        full = False
        while json.loads(store.read("lease/1.json"))["beat"] == 0:
            time.sleep(0.01)
        lease.check()


def test_bad_settings(store: Store) -> None:
    for ttl in (0, -1.0):
        with pytest.raises(ValueError, match=f"ttl must be a positive number of seconds, got {ttl}"):
            Lease(store, ttl=ttl)


# --- files that no lease has written


@pytest.mark.parametrize(
    "name", ["007.json", "7.txt", "7", "\N{FULLWIDTH DIGIT SEVEN}.json", "-7.json", "7.json.json", "x.json"]
)
def test_other_files_in_the_folder_are_not_leases(store: Store, name: str) -> None:
    store.write(f"lease/{name}", b"{}")
    with Lease(store) as lease:
        assert lease.number == 1


@pytest.mark.parametrize(
    "record",
    [
        {"ttl": 1e12},
        {"ttl": -1e12},
        {"ttl": "long"},
        {"ttl": 1e12, "pid": "../../self", "started": 1},
        {"pid": -1},
        {"released": "yes"},
        [],
    ],
)
def test_a_foreign_file_without_heartbeats_is_taken_over(
    store: Store, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_MOST_TTL", 0.1)
    if isinstance(record, dict) and "pid" in record:
        record["host"] = leases._host()
    store.write("lease/7.json", json.dumps(record).encode())
    with Lease(store, ttl=0.1) as lease:
        assert lease.number == 8


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"ttl": 1e400}', b'{"owner": "' + b"x" * 100_000 + b'"}'])
def test_a_file_that_cannot_be_parsed_is_a_holder_without_heartbeats(store: Store, content: bytes) -> None:
    store.write("lease/7.json", content)
    with Lease(store, ttl=0.1) as lease:
        assert lease.number == 8


def test_a_file_that_is_listed_but_not_there_is_named(store: Store) -> None:
    store.write("lease/1.json", b"{}")
    (store.local("lease") / "7.json").symlink_to("nowhere")
    with pytest.raises(RegistryError, match=r"lease/7\.json is listed but cannot be read: delete it"), Lease(store):
        raise AssertionError
