"""Several processes that answer on one port: they are started, replaced when one dies, and ended together."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from tempfile import TemporaryDirectory

from evertune.serve.listening import listen
from evertune.serve.metrics import OF_ALL_PROCESSES
from evertune.serve.settings import ServerSettings
from evertune.utils.extras import library
from evertune.utils.processes import die_with_parent

_PAUSE = 1.0
"""Seconds before a worker that died is replaced, so that one that always dies does not take the whole processor."""

Work = Callable[[socket.socket, Callable[[], None]], int]
"""Serves on a socket, calls its second argument once it does, and returns an exit code."""

logger = logging.getLogger("evertune.serve")


class Workers:
    """Processes that share a listening socket, so that each connection is answered by whichever is free.

    Each has a model and follows the alias by itself. A worker that dies is replaced, and the connections that had not
    been accepted yet are answered by the others. The counts of all are added up, see :class:`ServeMetrics`. Unless
    ``OMP_NUM_THREADS`` is set, the processors are divided among the workers.

    Args:
        work: What a worker does, a function that can be pickled. It is run in a new process.
        n_workers: Number of workers.

    Raises:
        ValueError: If ``n_workers`` is not positive.
    """

    def __init__(self, work: Work, n_workers: int) -> None:
        if n_workers < 1:
            raise ValueError(f"workers must be positive, got {n_workers}")
        self._work, self._n_workers = work, n_workers
        self._context = multiprocessing.get_context("spawn")
        self._started = self._context.Event()  # by the first worker that accepts requests
        self._workers: list[SpawnProcess] = []
        self._ending = False

    def run(self, settings: ServerSettings) -> int:
        """Serve until SIGTERM or SIGINT; a second signal ends the requests under way.

        Returns:
            0 after a signal; or the exit code of the first worker, if it could not start.

        Raises:
            OSError: If the port is taken.
        """
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._n_workers)))
        with listen(settings) as listening, TemporaryDirectory(prefix="evertune-serve-") as counts, self._signals():
            os.environ[OF_ALL_PROCESSES] = counts
            for _ in range(self._n_workers):
                self._start(listening)
            while self._workers:
                wait([worker.sentinel for worker in self._workers])
                for worker in [worker for worker in self._workers if worker.exitcode is not None]:
                    self._workers.remove(worker)
                    library("prometheus_client.multiprocess", "serve").mark_process_dead(worker.pid)
                    if not (self._ending or self._started.is_set()):
                        self._end()
                        return self._wait_for_others(max(1, worker.exitcode or 1))
                    if not self._ending:
                        words = f"a worker ended with exit code {worker.exitcode} and is replaced"
                        logger.error(words, extra={"event": "worker", "pid": worker.pid})
                        time.sleep(_PAUSE)
                        self._start(listening)
        return 0

    def _start(self, listening: socket.socket) -> None:
        if self._ending:
            return
        worker = self._context.Process(target=_run, args=(self._work, listening, self._started, os.getpid()))
        worker.start()
        self._workers.append(worker)
        if self._ending:  # the signal came before it was in the list
            worker.terminate()

    def _end(self) -> None:
        self._ending = True
        for worker in self._workers:
            worker.terminate()

    def _wait_for_others(self, code: int) -> int:
        for worker in self._workers:
            worker.join()
        return code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, lambda *_: self._end())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(work: Work, listening: socket.socket, started: Event, parent: int) -> None:
    os.setsid()  # Ctrl-C is passed on by the parent, which would otherwise be a second signal
    die_with_parent()
    if os.getppid() == parent:  # else it has died already
        raise SystemExit(work(listening, started.set))
