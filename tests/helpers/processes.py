"""Real processes for tests, forked from one that has imported the heavy packages: a start costs no imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.preloaded"])


class Command:
    """A Python command in a process of its own, as a shell would start it, but forked.

    What Lightning would start as further ranks needs a shell's process: this one has no command line of its own.

    Args:
        folder: in which it runs.
        arguments: a script's path and its arguments, or ``"-m"``, a module, and its arguments.
        environment: all that its environment holds.
    """

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.args = arguments
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        given = dict(os.environ if environment is None else environment)
        self.process = FORKS.Process(target=_run, args=(str(folder), arguments, given, *map(str, self._files)))
        self.process.start()

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._files[1].read_text() if self._files[1].exists() else ""

    def wait(self, timeout: float = 1_200) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it has written; it is killed if it takes longer than ``timeout`` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        out, err = (file.read_text() for file in self._files)
        self._output.cleanup()
        return subprocess.CompletedProcess(self.args, self.process.exitcode, out, err)


def as_started_by_a_shell() -> None:
    """For the beginning of a forked process: it forks its loaders' workers.

    A fork server of its own, which it would start instead, imports everything once more.
    """
    multiprocessing.set_start_method(None, force=True)


def _run(folder: str, arguments: tuple[str, ...], environment: dict[str, str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    as_started_by_a_shell()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*arguments]
    if arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
