"""What the ranks run in tests of the supervisor: python -m tests.helpers.node_worker BEHAVIOUR FOLDER [STEPS]."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from evertune.launch.supervisor.worker import run
from evertune.utils.beat import own_beat


def main(arguments: list[str]) -> None:
    behaviour, folder = arguments[0], Path(arguments[1])
    steps = int(arguments[2]) if len(arguments) > 2 else 10
    print(f"starts {behaviour}")
    if behaviour.startswith("code-"):
        sys.exit(int(behaviour.removeprefix("code-")))
    if behaviour == "crash":
        raise RuntimeError("every time")
    _train(behaviour, folder, steps)
    print("ends")


def _train(behaviour: str, folder: Path, steps: int) -> None:
    """Steps with a sum over all ranks; in step 3 of the first try, something happens to the last rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    beat, last = own_beat(), dist.get_rank() == dist.get_world_size() - 1
    assert beat is not None
    asked = Path(os.environ["EVERTUNE_NODE_DIR"]) / f"asked-{os.environ['LOCAL_RANK']}"
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    for step in range(steps):
        beat.begin_step(step)
        if step == 3 and last and not (folder / "happened").exists():
            (folder / "happened").touch()
            _happen(behaviour)
        beat.mark(step)
        stop = torch.tensor(float(asked.exists()))
        dist.all_reduce(stop)
        beat.end_step(step + 1)
        (folder / f"step-{dist.get_rank()}").write_text(str(step + 1))
        if stop:
            sys.exit(75)
        time.sleep(0.05)


def _happen(behaviour: str) -> None:
    if behaviour == "crash-once":
        raise RuntimeError("once")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "sleeps":
        _sleep_for_ever()


def _sleep_for_ever() -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    run(main, sys.argv[1:])
