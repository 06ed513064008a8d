"""A command of evertune as one rank of a run: signals, output and exit codes, as the supervisor of the node expects.

The rank and the supervisor of its node (:mod:`evertune.launch.supervisor.node`) communicate through files in the
folder ``EVERTUNE_NODE_DIR``, by local rank: ``rank-0.json`` (it is alive and handles signals), ``beat-0`` (its
progress), ``stack-0`` (its stack traces, on SIGUSR1), ``asked-0`` (it got SIGUSR2: it must save and end), ``code-0``
(the exit code of its command).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evertune.utils.beat import own_beat
from evertune.utils.processes import die_with_parent

_TERMINATION = 5.0
"""Seconds from SIGTERM to SIGKILL: a rank that waits in a collective for a lost rank would never react to SIGTERM."""

_TRAINS = ("fit", "update")


def run(command: Callable[[list[str]], object], arguments: list[str]) -> None:
    """Run a command as one rank and end this process.

    Exit codes that are results, not crashes, are passed to the supervisor in a file, and torchrun sees a success. All
    others make torchrun restart all ranks.

    Args:
        command: Command to run. It ends by returning, or by ``SystemExit`` with an exit code or a message.
        arguments: Arguments of the command.

    Raises:
        SystemExit: Always.
    """
    if "EVERTUNE_NODE_DIR" not in os.environ:
        sys.exit("a rank is started by evertune.launch.supervisor.node; use `evertune launch`")
    folder, local_rank = Path(os.environ["EVERTUNE_NODE_DIR"]), os.environ["LOCAL_RANK"]
    # Before the slow imports: the supervisor has to know this process, also if it hangs in one of them.
    _announce(folder, local_rank, awaited=arguments[:1] in [[name] for name in _TRAINS])
    from evertune.launch.settings import DECIDED
    from evertune.utils.processes import PREEMPTED
    from evertune.utils.ranks import leave

    try:
        code = _code_of(command, arguments)
    finally:
        if (folder / f"beat-{local_rank}").exists() and (beat := own_beat()) is not None:
            beat.end_step(beat.step)  # this process may take long to exit
    leave()
    sys.stdout.flush()
    if code in (*DECIDED, PREEMPTED):
        _write(folder / f"code-{local_rank}", {"pid": os.getpid(), "rank": int(os.environ["RANK"]), "code": code})
        sys.exit(0)
    sys.exit(code)


def with_layout(arguments: list[str]) -> list[str]:
    """A command with the current number of nodes and processes added, so that one YAML serves everywhere.

    Args:
        arguments: Command of the rank. Only ``fit`` and ``update`` train, and only these are changed.
    """
    if arguments[:1] not in [[name] for name in _TRAINS]:
        return arguments
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return [*arguments, f"--trainer.devices={local}", f"--trainer.num_nodes={world // local}"]


def _announce(folder: Path, local_rank: str, awaited: bool) -> None:
    """Install the signal handlers, redirect the output to the log, and announce this process to the supervisor."""
    die_with_parent()
    for name in ("code", "asked", "beat"):  # of the process before it
        (folder / f"{name}-{local_rank}").unlink(missing_ok=True)
    stack = (folder / f"stack-{local_rank}").open("w")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what a Trainer may put back after a fit
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)  # which keeps the file open
    asked = folder / f"asked-{local_rank}"
    signal.signal(signal.SIGUSR2, lambda *_: asked.touch())
    _end_soon_after_sigterm()
    log = (folder / "logs").resolve() / f"rank-{os.environ['RANK']}.log"
    with log.open("ab") as file:
        offset = file.tell()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    facts = {
        "pid": os.getpid(),
        "rank": int(os.environ["RANK"]),
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "time": time.monotonic(),
        "awaited": awaited,
        "log": str(log),
        "offset": offset,
    }
    _write(folder / f"rank-{local_rank}.json", facts)


def _end_soon_after_sigterm() -> None:
    """Kill this process soon after SIGTERM. Lightning waits for the next batch, which never comes if a rank is lost."""
    # Python runs its handlers in the main thread between bytecodes, so not while that waits in a collective. The wakeup
    # pipe is written at once by the handler in C, and a thread can read it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(_TERMINATION)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="evertune-termination", daemon=True).start()


def _code_of(command: Callable[[list[str]], object], arguments: list[str]) -> int:
    try:
        command(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _write(path: Path, facts: dict[str, Any]) -> None:
    # A rename is atomic: the supervisor never reads half a file.
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(facts))
    draft.replace(path)
