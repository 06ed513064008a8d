"""``evertune serve`` as a process of its own, and a registry for it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import torch

from evertune.lightning_modules import SequenceClassificationModule
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.processes import Command
from tests.helpers.served import publish

PATIENCE = 120.0


class Running:
    """A server in a process of its own."""

    def __init__(self, registry: str, folder: Path, *arguments: str) -> None:
        words = ["-m", "evertune", "serve", "--registry", registry, "--poll", "0.05", "--server.port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.command = Command(folder, *words, "--device", "cpu", *arguments, environment=environment)
        self.port = self._port()
        self.url = f"http://127.0.0.1:{self.port}"

    def _port(self) -> int:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.command.process.is_alive():
            if found := re.search(r'"address": "[^"]*:(\d+)"', self.command.errors):
                return int(found[1])
            time.sleep(0.02)
        raise AssertionError(self.command.errors)

    def end(self) -> subprocess.CompletedProcess[str]:
        """SIGTERM, and what the process has left."""
        pid = self.command.process.pid
        assert pid is not None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        return self.command.wait(PATIENCE)

    def raw(self, data: bytes) -> bytes:
        """What the server answers to bytes that no client would send."""
        answer = b""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        with connection, suppress(ConnectionError):  # it may close before it has read everything
            connection.sendall(data)
            while part := connection.recv(65_536):
                answer += part
        return answer


def two_versions(folder: Path) -> Registry:
    """Two versions of a small model, the first in production."""
    backbone = tiny_bert(folder / "bert")
    registry = Registry(folder / "registry")
    for number, classes in ((1, ["business", "sport"]), (2, ["film", "law"])):
        torch.manual_seed(number)
        module = SequenceClassificationModule(backbone, classes=classes)
        module.configure_model()
        module.save_pretrained(folder / str(number))
        files = {file.name: file.read_bytes() for file in (folder / str(number)).iterdir()}
        publish(registry, folder, files, "SequenceClassificationModule")
    registry.promote(1)
    return registry


def ask(url: str, done: threading.Event, found: list[tuple[int, str, int]]) -> None:
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        while not done.is_set():
            answer = http.post("/predict", json={"text": "the bank share"})
            body = answer.json()
            found.append((answer.status_code, body.get("label", ""), body.get("version", 0)))
