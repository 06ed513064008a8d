"""``evertune serve`` as a process, and a client that asks while the server goes over to another version."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from evertune.utils.processes import die_with_parent

PAUSE = 0.2  # seconds between two requests of a client
POLL = 0.5  # seconds between two looks of the server at what is in production
PATIENCE = 120.0  # seconds that a new version may take to answer


class Server:
    """``evertune serve``, which follows what is in production in ``folder/registry``, and ends with this process."""

    def __init__(self, folder: Path) -> None:
        log = folder / "server.log"
        words = f"-m evertune serve --server.port 0 --server.log json --poll {POLL} --registry".split()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words, str(folder / "registry")],
                stdout=file,
                stderr=file,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (one system call): SIGTERM ends this process at once
            )
        while not (found := re.search(r'"address": "([^"]+)"', log.read_text())):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended: {log.read_text()}")
            time.sleep(0.05)
        self.url = f"http://{found[1]}/predict"

    def ask(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The answer to each text: its label, its confidence, and the version that says so."""
        answers: list[dict[str, Any]] = []
        for start in range(0, len(texts), 64):
            body = json.dumps({"records": [{"text": text} for text in texts[start : start + 64]]}).encode()
            with urlopen(Request(self.url, body, {"Content-Type": "application/json"}), timeout=60) as answer:
                answers += json.load(answer)["answers"]
        return answers

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


class Client:
    """A client that never stops asking; it notes the version of each answer, and what failed."""

    def __init__(self, server: Server, text: str) -> None:
        self.versions, self.failed = list[int](), list[str]()
        self._server, self._text, self._done = server, text, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._done.wait(PAUSE):
            try:
                self.versions.append(self._server.ask([self._text])[0]["version"])
            except OSError as error:
                self.failed.append(str(error))

    def wait_for(self, version: int) -> float:
        """Wait until a version answers, and return how many seconds that took."""
        start = time.perf_counter()
        while version not in self.versions:
            if time.perf_counter() - start > PATIENCE:
                raise RuntimeError(f"version {version} did not answer within {PATIENCE} seconds")
            time.sleep(PAUSE / 10)
        return time.perf_counter() - start

    def end(self) -> None:
        self._done.set()
        self._thread.join()
