"""Real servers for the tests of live sources, and what every such source must do.

- :class:`Kafka`: the mock cluster of librdkafka, in a process of its own. It speaks Kafka's protocol over TCP, keeps
  messages in memory, can be taken down (connections cut, port closed, messages kept) and brought up again, drops old
  messages on request, and keeps the offsets of groups. It has no compaction, no transactions, no authentication, and
  cannot add partitions to a topic; :meth:`Kafka.produce_marker` writes what a transaction leaves behind.
- :class:`Redis`: ``redis-server`` on a socket in a temporary folder, with its append-only file.
- :class:`Postgres`: ``initdb`` and ``postgres`` on a free port, where they are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evertune.sources.base import Incoming, Source

_BROKER = """
import ctypes, glob, json, os, sys
import confluent_kafka

folder = os.path.dirname(os.path.dirname(confluent_kafka.__file__))
library = ctypes.CDLL(glob.glob(f"{folder}/confluent_kafka.libs/librdkafka*")[0])
library.rd_kafka_new.restype = ctypes.c_void_p
library.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
handle = ctypes.c_void_p(library.rd_kafka_new(0, None, None, 0))
cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(handle, 1))
types = {int: lambda value: ctypes.c_int64(value), str: lambda value: value.encode()}
print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
for line in sys.stdin:
    function, *arguments = json.loads(line)
    arguments = [types[type(value)](value) for value in arguments]
    print(getattr(library, f"rd_kafka_mock_{function}")(cluster, *arguments), flush=True)
"""


class Kafka:
    """librdkafka's mock cluster of one broker; see the module's docstring for what it can do."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _BROKER]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = self.process.stdout.readline().strip()

    def create(self, topic: str, partitions: int = 1) -> None:
        self._do("topic_create", topic, partitions, 1)

    def produce(self, topic: str, values: list[bytes | None], partition: int = 0) -> None:
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.address, "linger.ms": 0})
        for value in values:
            producer.produce(topic, value, partition=partition)
        assert producer.flush(30) == 0

    def produce_marker(self, topic: str, partition: int = 0) -> None:
        """Write a commit marker: a control record, which takes an offset and is no message."""
        marker = b"\x00\x00\x00\x00\x00\x01"
        record = b"\x00\x00\x00" + bytes([2 * 4]) + b"\x00\x00\x00\x01" + bytes([2 * len(marker)]) + marker + b"\x00"
        record = bytes([2 * len(record)]) + record
        header = struct.pack(">ihiqqqhii", 0, 0b110000, 0, 0, 0, 1, 0, -1, 1)[4:]  # transactional, control
        rest = struct.pack(">ib", 0, 2) + struct.pack(">I", 0) + header + record
        batch = struct.pack(">qi", 0, len(rest)) + rest
        name = topic.encode()
        body = struct.pack(">hhih", 0, 7, 1, 4) + b"test"  # Produce, version 7
        body += struct.pack(">hhi", -1, 1, 5000) + struct.pack(">ih", 1, len(name)) + name
        body += struct.pack(">iii", 1, partition, len(batch)) + batch
        host, port = self.address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            size = struct.unpack(">i", connection.recv(4))[0]
            answer = connection.recv(size, socket.MSG_WAITALL)
        assert struct.unpack_from(">h", answer, 4 + 4 + 2 + len(name) + 4 + 4)[0] == 0, answer

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        self._do("partition_delete_records", topic, partition, offset)

    def down(self) -> None:
        self._do("broker_set_down", 1)

    def up(self) -> None:
        self._do("broker_set_up", 1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _do(self, *command: str | int) -> None:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "0", command


class Redis:
    """A ``redis-server`` that keeps what it acknowledged, also when it is killed.

    Args:
        folder: where its socket and its files are.
        durable: False for a server that keeps nothing over a restart.
        password: which it asks for.
    """

    def __init__(self, folder: Path, durable: bool = True, password: str | None = None) -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed (apt-get install redis-server)")
        self.socket = folder / "redis.sock"
        secret = f":{password}@" if password else ""
        self.url = f"unix://{secret}{self.socket}"
        self._command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "yes" if durable else "no", "--appendfsync", "always"]
        self._command += ["--requirepass", password] if password else []
        self.start()

    def start(self) -> None:
        import redis

        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url)
        for _ in range(200):
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return
            time.sleep(0.05)
        raise AssertionError("redis-server does not start")

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


class Postgres:
    """A PostgreSQL server of its own, where one and its driver ``psycopg`` are installed."""

    def __init__(self) -> None:
        folders = [Path(path).parent for path in [shutil.which("initdb")] if path]
        folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        binaries = next((folder for folder in folders if (folder / "postgres").exists()), None)
        if binaries is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
        pytest.importorskip("psycopg", reason='psycopg is not installed (pip install "psycopg[binary]")')
        self.folder = Path(tempfile.mkdtemp(prefix="evertune-postgres-"))
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data = self.folder / "data"
        run = [*self._as_user, str(binaries / "initdb"), "-D", str(data), "-U", "test", "-A", "trust", "--no-sync"]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
        settings = ["-p", str(port), "-h", "127.0.0.1", "-k", str(self.folder), "-c", "timezone=Europe/Berlin"]
        self._command = [*self._as_user, str(binaries / "postgres"), "-D", str(data), *settings]
        self.url = f"postgresql+psycopg://test@127.0.0.1:{port}/postgres"
        self.start()

    def start(self) -> None:
        import psycopg

        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL, cwd=self.folder)
        for _ in range(200):
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url.replace("+psycopg", "")).close()
                return
            time.sleep(0.05)
        raise AssertionError("postgres does not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGQUIT)  # at once, as in a crash, but with its children
        self.process.wait()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


def read_all(source: Source, offset: dict | None = None, limit: int = 1_000_000) -> tuple[list[Incoming], dict]:
    """Read on until nothing is left, with offsets that have been through JSON, as the journal keeps them."""
    records = []
    while True:
        chunk = source.read(offset, limit)
        assert len(chunk.records) <= limit
        offset = json.loads(json.dumps(chunk.offset))
        records += chunk.records
        if not chunk.records:
            return records, offset


def check_contract(source: Source, add: Callable[[list[dict]], None]) -> None:
    """What every source promises.

    Args:
        source: with nothing in it.
        add: appends records with the fields "id" and "text", both strings.
    """

    def texts(records: list[Incoming]) -> list[str]:
        assert all(record.error is None for record in records)
        return [record.value["text"] for record in records]

    def batch(start: int, stop: int) -> list[dict]:
        return [{"id": str(i), "text": f"text {i}"} for i in range(start, stop)]

    nothing, start = read_all(source)
    assert nothing == []

    add(batch(0, 23))
    once, end = read_all(source)
    assert sorted(texts(once)) == sorted(record["text"] for record in batch(0, 23))
    assert len({record.origin for record in once}) == 23
    for limit in (1, 2, 5, 22, 23, 24):
        assert read_all(source, limit=limit) == (once, end), limit
        assert read_all(source, start, limit) == (once, end), limit
    middle = source.read(None, 9)
    assert source.read(None, 9) == middle
    assert read_all(source, middle.offset)[0] == once[9:]
    assert source.read(end, 5).records == []

    add(batch(23, 30))
    assert sorted(texts(read_all(source, end, 3)[0])) == sorted(record["text"] for record in batch(23, 30))
    rest, _ = read_all(source, middle.offset)
    assert sorted(texts([*middle.records, *rest])) == sorted(record["text"] for record in batch(0, 30))
