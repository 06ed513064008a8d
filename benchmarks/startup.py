"""How long evertune takes to start, as a multiple of ``python -c pass``, each in a fresh interpreter.

    python benchmarks/startup.py [--quick]

What is compared runs side by side: in each round every command once, so that a busy machine slows all of them. The
figure is the median over the rounds of a command's time over that of ``pass`` in the same round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COMMANDS = {
    "import evertune": (["-c", "import evertune"], 3.0),
    "evertune --help": (["-m", "evertune", "--help"], 10.0),
    "evertune registry list": (["-m", "evertune", "registry", "list", "registry"], 40.0),
}
"""What is measured: the arguments of Python, and the most that it may take."""


def seconds(arguments: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds and median multiple of ``pass`` of each command."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    ratios: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "registry" / "versions").mkdir(parents=True)
        (Path(folder) / "registry" / "versions" / ".keep").touch()
        for number in range(rounds + 1):  # the first warms the disk's cache
            bare = seconds(["-c", "pass"], folder)
            for name, (arguments, _) in COMMANDS.items():
                taken = seconds(arguments, folder)
                if number:
                    times[name].append(taken)
                    ratios[name].append(taken / bare)
    return {name: (median(times[name]), median(ratios[name])) for name in COMMANDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 25")
    rounds = 5 if parser.parse_args().quick else 25
    found = measure(rounds)
    print(f"{'':<24}{'milliseconds':>14}{'x python':>10}{'at most':>10}")
    bars = {}
    for name, (taken, ratio) in found.items():
        limit = COMMANDS[name][1]
        bars[name] = {"value": round(ratio, 2), "limit": limit, "ok": ratio <= limit}
        print(f"{name:<24}{1000 * taken:>14.0f}{ratio:>10.1f}{limit:>10.0f}")
    results = {f"{name}, seconds": round(taken, 4) for name, (taken, _) in found.items()}
    print(json.dumps({"benchmark": "startup", "size": f"{rounds} rounds", "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
