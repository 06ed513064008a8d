"""A small update, run as a child process by the watch of test_watch.py: `watch_worker.py FOLDER`.

What it does stands in FOLDER/mode. It learns what has arrived by copying `arrived` to `learned`. It is a plain script
that loads nothing, so that it starts in milliseconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1])
    mode = (folder / "mode").read_text()
    if mode == "follow":
        from evertune.utils.processes import end_with_supervisor

        end_with_supervisor()
    assert os.environ["EVERTUNE_LEASE"]
    print("updating é", mode, flush=True)
    (folder / "plan").touch()
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if mode in ("follow", "ignore", "save"):
        helper = subprocess.Popen(["sleep", "600"])
        (folder / "helper").write_text(str(helper.pid))
        saved: list[int] = []
        signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "ignore" else lambda number, _: saved.append(number))
        (folder / "ready").touch()
        while not saved:
            time.sleep(0.01)
        (folder / "saved").touch()
        return 0  # as Lightning does
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "preempt":
        return 75
    if mode == "promote":
        check = {
            "name": "accuracy",
            "slice": "sports",
            "champion": 0.9,
            "challenger": 0.95,
            "limit": 0.8,
            "passed": True,
        }
        verdict = {"event": "verdict", "level": "info", "message": "passed", "passed": True, "checks": [check]}
        print(json.dumps(verdict), flush=True)
        (folder / "learned").write_bytes((folder / "arrived").read_bytes())
    if mode == "student":
        student = {"event": "student", "level": "info", "message": "student of version 7: it is in production"}
        print(json.dumps(student | {"status": "promoted", "version": 3}), flush=True)
    (folder / "attempted").write_bytes((folder / "arrived").read_bytes())
    (folder / "plan").unlink()
    return {"promote": 0, "nothing": 3, "student": 3, "refuse": 4, "stop": 5, "fail": 1}[mode]


if __name__ == "__main__":
    sys.exit(main())
