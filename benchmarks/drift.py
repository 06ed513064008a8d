"""Do drift detectors hold the false-alarm rate that was asked for, how soon do they find a change, what do they cost?

* Run length: records from arming to the first false alarm, the mean over runs; every run has its own reference and its
  own stream (with ``--streams``, each reference several). Independent records, and autocorrelated ones (AR(1), 0.5).
  Beside the ratio to what was asked for stands its standard error.
* Delay at the largest rate asked for: records from a change of the mean, of 0.5 and 1 standard deviations, to the
  alarm; the change comes after 500 records of calm. Runs that alarm before it do not count. For features in 16
  dimensions the shift has that length. Classes are cut from a number, with shares of 40, 30, 20 and 10%.
* Cost: microseconds a record (with 384 features for embeddings, in batches of 32) and seconds to arm.
* River's own detectors on the same streams, with parameters searched for the same run length on the true distribution:
  what a user could get who knew it. Needs ``pip install evertune[drift]``.

    python benchmarks/drift.py                          # all; about an hour on two cores
    python benchmarks/drift.py --quick                  # 20 runs at 1,000: minutes
    python benchmarks/drift.py --detectors MMD ADWIN --runs 200 --out mmd-adwin.json
    python benchmarks/drift.py --detectors River        # River's own alone
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from evertune import drift
from evertune.drift import Detector

N_FEATURES = 16
AUTOCORRELATION = 0.5
LONGEST = 10  # run lengths asked for, after which a run is broken off
CALM, SHIFTS, LONGEST_DELAY = 500, (0.5, 1.0), 5_000


@dataclass(frozen=True)
class Subject:
    """A detector: its settings for independent and for autocorrelated records."""

    name: str
    independent: dict[str, Any]
    correlated: dict[str, Any]
    scalar: bool = False
    cuts: tuple[float, ...] = ()

    def make(self, arl: float, correlated: bool, seed: int) -> Detector:
        made: Detector = getattr(drift, self.name.partition(" ")[0])(
            arl=arl, seed=seed, **(self.correlated if correlated else self.independent)
        )
        return made

    @property
    def n_features(self) -> int:
        return 1 if self.scalar else N_FEATURES

    def seen(self, records: torch.Tensor) -> torch.Tensor:
        """What the detector gets of records: themselves, or classes."""
        return torch.bucketize(records, torch.tensor(self.cuts)) if self.cuts else records


_LONG = {"reference_size": 2_048, "window_size": 128, "block_size": 64}
SUBJECTS = [
    Subject("MMD", {"reference_size": 512}, _LONG),
    Subject("LSDD", {"reference_size": 512}, _LONG),
    Subject("MarginalKS", {"reference_size": 512}, _LONG),
    Subject("ClassifierTest", {"reference_size": 512}, _LONG),
    Subject("KernelCUSUM", {"reference_size": 512}, {"reference_size": 2_048, "block_size": 32}),
    Subject("PageHinkley", {"reference_size": 500}, {"reference_size": 2_048, "block_size": 32}, scalar=True),
    Subject(
        "PageHinkley delta=0.5",
        {"reference_size": 500, "delta": 0.5},
        {"reference_size": 2_048, "block_size": 16, "delta": 0.5},
        scalar=True,
    ),
    Subject("ADWIN", {"reference_size": 500}, {"reference_size": 2_048, "block_size": 32}, scalar=True),
    Subject("HDDM", {}, {"reference_size": 2_048, "block_size": 32}, scalar=True),
    Subject("LabelShift", {}, _LONG, scalar=True, cuts=(-0.2533, 0.5244, 1.2816)),
]


def stream(n_features: int, correlated: bool, seed: int, size: int = 256) -> Iterator[torch.Tensor]:
    """Standard normal records, without end, in batches."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.randn(n_features, generator=generator)
    if correlated:
        powers = AUTOCORRELATION ** torch.arange(size + 1.0)
        ahead = torch.arange(size)[:, None] - torch.arange(size)
        weights = math.sqrt(1 - AUTOCORRELATION**2) * torch.where(ahead >= 0, powers[ahead.clamp(min=0)], 0.0)
    while True:
        records = torch.randn(size, n_features, generator=generator)
        if correlated:
            records = weights @ records + powers[1:, None] * last
            last = records[-1]
        yield records


def armed(subject: Subject, detector: Detector, records: Iterator[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Arm a detector; what is left of the batch that completed the reference, and the seconds it took."""
    start = time.perf_counter()
    while True:
        batch = next(records)
        missing = getattr(detector, "reference_size") - detector.n_seen  # noqa: B009  (not every detector has it)
        detector.update(subject.seen(batch[:missing]))
        if detector.armed:
            return batch[missing:], time.perf_counter() - start


def run_length(subject: Subject, arl: float, correlated: bool, streams: int, seed: int) -> dict[str, float]:
    """Runs up to a false alarm, with one reference: the mean length, and how many were broken off."""
    torch.set_num_threads(1)
    detector = subject.make(arl, correlated, seed)
    records = stream(subject.n_features, correlated, 1_000_000 + seed)
    batch, arming = armed(subject, detector, records)
    start, state = detector.n_seen, detector.state_dict()
    lengths, cut = [], 0
    for other in range(streams):
        if other:
            detector.load_state_dict(state)
            records = stream(subject.n_features, correlated, 10_000_000 * other + seed)
            batch = next(records)
        while detector.detected_at is None and detector.n_seen - start < LONGEST * arl:
            if len(batch):
                detector.update(subject.seen(batch))
            batch = next(records)
        lengths.append((detector.detected_at or detector.n_seen) - start)
        cut += detector.detected_at is None
    return {"length": mean(lengths), "arming": arming, "cut": cut}


def delay(subject: Subject, arl: float, shift: float, seed: int) -> float | None:
    """Records from a change to its detection; None after a false alarm before."""
    torch.set_num_threads(1)
    detector = subject.make(arl, False, seed)
    records = stream(subject.n_features, False, 2_000_000 + seed, size=32)
    batch, _ = armed(subject, detector, records)
    start = detector.n_seen
    moved = torch.full((subject.n_features,), shift / math.sqrt(subject.n_features))
    while detector.n_seen - start < CALM + LONGEST_DELAY:
        if len(batch):
            positions = detector.n_seen - start + torch.arange(len(batch))
            detector.update(subject.seen(batch + (positions >= CALM)[:, None] * moved))
        if detector.detected_at is not None:
            found = detector.detected_at - start - CALM
            return found if found > 0 else None
        batch = next(records)
    return LONGEST_DELAY


def cost(subject: Subject) -> float:
    """Microseconds a record, in batches of 32, where no alarm interrupts."""
    torch.set_num_threads(1)
    n_features = 1 if subject.scalar else 384
    detector = subject.make(1_000, False, 0)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(getattr(detector, "reference_size"), n_features, generator=generator)  # noqa: B009
    detector.update(subject.seen(reference))
    batches = subject.seen(torch.randn(200, 32, n_features, generator=generator))
    start = time.perf_counter()
    for batch in batches:
        detector.update(batch)
    return (time.perf_counter() - start) / batches[..., 0].numel() * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=[*(s.name for s in SUBJECTS), "River"], help="default: all")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--streams", type=int, default=1, help="for each reference: where arming takes long")
    parser.add_argument("--arl", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--quick", action="store_true", help="20 runs at 1,000")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    runs, arls = (20, [1_000]) if options.quick else (options.runs, options.arl)
    fewer = min(runs, 100)  # delays vary less than run lengths
    subjects = [s for s in SUBJECTS if not options.detectors or s.name in options.detectors]
    console, results = Console(width=120), []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:

        def over_runs(function: Callable[..., Any], what: str, n: int = runs) -> list[Any]:
            return list(track(pool.imap_unordered(function, range(n)), what, n, console=console, transient=True))

        for subject in subjects:
            for arl in arls:
                for correlated in (False, True):
                    what = f"{subject.name}, {arl:,}, {'AR(1) 0.5' if correlated else 'independent'}"
                    told = over_runs(partial(_run, subject.name, arl, correlated, options.streams), what)
                    lengths = [one["length"] for one in told]
                    results.append(
                        {
                            "detector": subject.name,
                            "arl": arl,
                            "stream": "AR(1) 0.5" if correlated else "independent",
                            "ratio": mean(lengths) / arl,
                            "error": stdev(lengths) / math.sqrt(runs) / arl,
                            "cut": sum(one["cut"] for one in told),
                            "arming": mean(one["arming"] for one in told),
                        }
                    )
                    console.print(what, f"{results[-1]['ratio']:.2f} ± {results[-1]['error']:.2f}", highlight=False)
            for shift in SHIFTS:
                found = over_runs(
                    partial(_delay, subject.name, arls[-1], shift), f"{subject.name}, shift {shift}", fewer
                )
                results.append({"detector": subject.name, "arl": arls[-1], "shift": shift, **_mean_delay(found)})
            results.append({"detector": subject.name, "us": pool.apply(_cost, (subject.name,))})
        for name in RIVER if not options.detectors or "River" in options.detectors else []:
            setting = pool.apply(searched, (name, arls[-1], runs))
            told = {"detector": f"River {name}", "arl": arls[-1], "setting": setting}
            for shift in SHIFTS:
                found = over_runs(partial(river_delay, name, setting, shift), f"River {name}, shift {shift}", fewer)
                results.append(told | {"shift": shift, **_mean_delay(found)})
            console.print(results[-2:])
    show(results, runs * options.streams, console)
    if options.out:
        options.out.write_text(json.dumps({"runs": runs, "streams": options.streams, "results": results}, indent=1))


RIVER: dict[str, tuple[Callable[[float], Any], float, float]] = {
    "PageHinkley": (lambda x: _river("PageHinkley", threshold=x), 1, 1_000),
    "PageHinkley delta=0.25": (lambda x: _river("PageHinkley", threshold=x, delta=0.25, alpha=1.0), 1, 1_000),
    "PageHinkley delta=0.5": (lambda x: _river("PageHinkley", threshold=x, delta=0.5, alpha=1.0), 1, 1_000),
    "ADWIN": (lambda x: _river("ADWIN", delta=1 / x, clock=8), 1e-3, 1e6),
    "KSWIN": (lambda x: _river("KSWIN", alpha=1 / x, seed=0), 1e3, 1e5),
    "HDDM_A": (lambda x: _river("binary.HDDMA", drift_confidence=1 / x, two_sided_test=True), 1.35, 1e12),
    "HDDM_W": (lambda x: _river("binary.HDDMW", drift_confidence=1 / x, two_sided_test=True), 1, 1e12),
}
"""River's detectors by a parameter that makes alarms rarer as it grows, and where it may lie.

Below 1.35 alarms of HDDM_A grow rarer again, since its cuts move with every record: one in about 11,500 is the most.
"""


def _river(name: str, **settings: Any) -> Any:
    from river import drift as river

    module, _, name = name.rpartition(".")
    return getattr(getattr(river, module) if module else river, name)(**settings)


def _river_alarm(name: str, setting: float, values: list[float]) -> int | None:
    """The number of the record, from 1, at which a detector of River first alarms after 500 records."""
    detector, bounded = RIVER[name][0](setting), name.startswith("HDDM")
    for i, value in enumerate(values):
        detector.update(1 / (1 + math.exp(-value)) if bounded else value)
        if detector.drift_detected and i >= CALM:
            return i + 1 - CALM
    return None


def searched(name: str, arl: int, runs: int) -> float:
    """The parameter at which run lengths have the mean asked for, by bisection on the same streams."""
    n_streams = min(runs, 20 if name == "KSWIN" else 100)  # KSWIN takes 300 us a record
    streams = torch.randn(n_streams, CALM + 2 * arl, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = (math.log(limit) for limit in RIVER[name][1:])
    for _ in range(9):
        middle = (low + high) / 2
        told = [_river_alarm(name, math.exp(middle), values) for values in streams]
        alarms = sum(one is not None for one in told)
        watched = sum(one or 2 * arl for one in told)  # runs that are broken off: exponentially distributed
        low, high = (low, middle) if watched / max(alarms, 1) > arl else (middle, high)
    return math.exp((low + high) / 2)


def river_delay(name: str, setting: float, shift: float, seed: int) -> float | None:
    """As :func:`delay`, of a detector of River which has seen as many records before."""
    records = stream(1, False, 2_000_000 + seed, size=CALM + CALM + LONGEST_DELAY)
    values = next(records)[:, 0]
    values[2 * CALM :] += shift
    found = _river_alarm(name, setting, values.tolist())
    return LONGEST_DELAY if found is None else found - CALM if found > CALM else None


def _mean_delay(found: list[float | None]) -> dict[str, float]:
    counted = [one for one in found if one is not None]
    return {"delay": mean(counted), "error": stdev(counted) / math.sqrt(len(counted)), "early": found.count(None)}


def _named(name: str) -> Subject:
    return next(subject for subject in SUBJECTS if subject.name == name)


def _run(name: str, arl: float, correlated: bool, streams: int, seed: int) -> dict[str, float]:
    return run_length(_named(name), arl, correlated, streams, seed)


def _delay(name: str, arl: float, shift: float, seed: int) -> float | None:
    return delay(_named(name), arl, shift, seed)


def _cost(name: str) -> float:
    return cost(_named(name))


def show(results: list[dict[str, Any]], runs: int, console: Console) -> None:
    table = Table(title=f"{runs} runs each: run length / run length asked for (1 is right), and delays")
    columns = ["detector", "asked", "independent", "AR(1) 0.5", *(f"delay at {s}" for s in SHIFTS), "arming", "record"]
    for column in columns:
        table.add_column(column, justify="left" if column == "detector" else "right")
    for name in dict.fromkeys(one["detector"] for one in results):
        own = [one for one in results if one["detector"] == name]
        us = next((f"{one['us']:.1f} us" for one in own if "us" in one), "")
        for arl in dict.fromkeys(one["arl"] for one in own if "arl" in one):
            rows = [one for one in own if one.get("arl") == arl]
            ratios = {one["stream"]: f"{one['ratio']:.2f} ± {one['error']:.2f}" for one in rows if "stream" in one}
            delays = {one["shift"]: f"{one['delay']:.0f} ± {one['error']:.0f}" for one in rows if "shift" in one}
            table.add_row(
                name,
                f"{arl:,}",
                *(ratios.get(what, "") for what in ("independent", "AR(1) 0.5")),
                *(delays.get(shift, "") for shift in SHIFTS),
                next((f"{one['arming']:.2f} s" for one in rows if "arming" in one), ""),
                us,
            )
    console.print(table)


if __name__ == "__main__":
    main()
