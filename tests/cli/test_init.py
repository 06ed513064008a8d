"""``--init``: a configuration for data that were looked at, which runs as it is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from evertune.cli.main import main
from evertune.sources.roles import find_roles
from evertune.sources.structure import find_structure
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import tiny_bert

SPANISH = {
    "facturación": "me cobraron dos veces la factura del mes número",
    "acceso": "no puedo entrar en mi cuenta desde el día",
    "envío": "el paquete llegó roto a mi casa con el pedido",
}
CHINESE = {
    "账单": "这个月的账单多收了两次费用请退款编号",
    "登录": "我今天无法登录我的账户请帮忙处理",
    "物流": "包裹送到家里的时候已经坏了",
}
ENGLISH = {
    "billing": "i was charged twice for invoice",
    "login": "i cannot sign in to my account since",
    "shipping": "the parcel arrived broken with order",
}


def rows(texts: dict[str, str], names: tuple[str, str, str], n: int = 60) -> list[dict[str, Any]]:
    number, text, label = names
    classes = list(texts)
    return [
        {number: f"r-{i}", text: f"{texts[classes[i % 3]]} {i}", label: classes[i % 3], "kanal": i % 2}
        for i in range(n)
    ]


def write_csv(folder: Path) -> Path:
    data = rows(SPANISH, ("nr", "texto", "etiqueta"))
    with (folder / "datos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(data[0]))
        writer.writeheader()
        writer.writerows(data)
    return folder / "datos.csv"


def write_jsonl(folder: Path) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows(CHINESE, ("编号", "文本", "类别")))
    (folder / "数据.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "数据.jsonl"


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows(ENGLISH, ("key", "utterance", "reason"))), folder / "tickets.parquet")
    return folder / "tickets.parquet"


WRITERS = [write_csv, write_jsonl, write_parquet]
COLUMNS = {write_csv: ("texto", "etiqueta"), write_jsonl: ("文本", "类别"), write_parquet: ("utterance", "reason")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("write", WRITERS)
def test_fit_runs_as_it_is(
    write: Callable[[Path], Path], here: Path, bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(here)
    assert run("fit", "--init", data.name, "--model", bert, "--memory_size", "12") == 0
    assert "3 classes" in capsys.readouterr().out
    config = yaml.safe_load((here / "stream.yaml").read_text())
    assert (config["data"]["text"], config["data"]["label"]) == COLUMNS[write]
    assert run("fit", "--config", "stream.yaml", "--data.n_experiences", "2") == 0
    assert (here / "evertune-run" / "report.html").is_file()


@pytest.mark.parametrize("write", [WRITERS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in WRITERS[1:])])
def test_update_runs_as_it_is(write: Callable[[Path], Path], here: Path, bert: str) -> None:
    (here / "inbox").mkdir()
    write(here / "inbox")
    assert run("update", "--init", "inbox", "--model", bert, "--memory_size", "12") == 0
    config = yaml.safe_load((here / "live.yaml").read_text())
    assert (config["schema"]["text"], config["schema"]["label"]) == COLUMNS[write]
    code = run("update", "--config", "live.yaml", "--trigger.init_args.min_records", "20", "--gate.min_accuracy", "0")
    assert code in (0, 4)  # trained, and judged: a tiny model may be refused
    assert list((here / "inbox-registry" / "versions").iterdir())


def test_numbers_are_learned_as_numbers(here: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "inbox").mkdir()
    with (here / "inbox" / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["nr", "review", "stars"])
        writer.writerows((f"r-{i}", f"it broke after {i} days", 1 + i % 8 / 2) for i in range(64))
    assert run("update", "--init", "inbox", "--model", bert, "--memory_size", "12") == 0
    assert "label in 'stars' (numbers from 1 to 4.5)" in capsys.readouterr().out
    config = yaml.safe_load((here / "live.yaml").read_text())
    assert config["model"]["class_path"].endswith(".SequenceRegressionModule")
    settings = config["model"]["init_args"]
    assert (settings["mean"], settings["scale"]) == (2.75, pytest.approx(1.1456))
    code = run("update", "--config", "live.yaml", "--trigger.init_args.min_records", "20")
    assert code in (0, 4)
    assert run("fit", "--init", "inbox/reviews.csv", "--model", bert, "--memory_size", "12") == 0
    assert run("fit", "--config", "stream.yaml", "--data.n_experiences", "2") == 0
    assert (here / "evertune-run" / "report.html").is_file()


def test_several_labels_of_a_text_are_learned_as_they_are(here: Path, bert: str) -> None:
    (here / "inbox").mkdir()
    rows = [
        {"text": f"it broke after {i} days", "tags": ["broken", "late"][: 1 + i % 2], "nr": f"r-{i}"} for i in range(64)
    ]
    (here / "inbox" / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("update", "--init", "inbox", "--model", bert, "--memory_size", "12") == 0
    config = yaml.safe_load((here / "live.yaml").read_text())
    assert config["model"]["init_args"]["multi_label"] is True
    assert "imprint_after" not in config.get("update", {})
    assert run("update", "--config", "live.yaml", "--trigger.init_args.min_records", "20") in (0, 4)


WORDS_AND_TAGS = [
    {"nr": f"r-{i}", "tokens": ["send", place, "a", "letter"], "ner": ["O", "B-PLACE", "O", "O"], "x": i % 2}
    for i, place in enumerate(["Cork", "Bergen", "Ghent"] * 16)
]
ASKED = [
    {
        "question": f"who is at home on day {i}?",
        "title": f"day {i}",
        "context": f"ann was out on day {i}, and bob was at home.",
        "answers": {"text": ["bob"], "answer_start": [f"ann was out on day {i}, and bob".index("bob")]},
    }
    for i in range(48)
]
TALKS = [
    {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": "a number"}]}
    for i in range(24)
]
PROMPTS = [{"instruction": f"say {i}", "output": f"it is {i}", "category": "ab"[i % 2]} for i in range(24)]


def write_rows(path: Path, data: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in data))


def test_tags_of_words_are_learned_as_they_are(here: Path, bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "places.jsonl", WORDS_AND_TAGS)
    assert run("fit", "--init", "places.jsonl", "--model", bert, "--memory_size", "12") == 0
    assert "48 records for token_classification: text in 'tokens', a tag for each word in" in capsys.readouterr().out
    assert run("fit", "--config", "stream.yaml", "--trainer.max_epochs", "1") == 0
    assert (here / "evertune-run" / "report.html").is_file()


def test_answers_in_a_context_are_learned_as_they_arrive(here: Path, bert: str) -> None:
    write_rows(here / "inbox" / "asked.jsonl", ASKED)
    assert run("update", "--init", "inbox", "--model", bert, "--memory_size", "12") == 0
    config = yaml.safe_load((here / "live.yaml").read_text())
    assert config["schema"]["text"] == ["question", "context"]
    assert config["model"]["class_path"].endswith(".QuestionAnsweringModule")
    short = ("--model.init_args.stride", "4")  # the tiny model takes 32 tokens
    code = run("update", "--config", "live.yaml", "--trigger.init_args.min_records", "20", *short)
    assert code in (0, 4)  # trained, and judged: a tiny model may be refused
    assert list((here / "inbox-registry" / "versions").iterdir())


@pytest.mark.parametrize(("data", "text", "label"), [(TALKS, "messages", None), (PROMPTS, "instruction", "output")])
def test_conversations_and_prompts_get_a_language_model(
    data: list[dict[str, Any]], text: str, label: str | None, here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_rows(here / "talks.jsonl", data)
    model = str(tiny_llama(tmp_path_factory.mktemp("llama")))
    assert run("fit", "--init", "talks.jsonl", "--model", model, "--memory_size", "12") == 0
    config = yaml.safe_load((here / "stream.yaml").read_text())
    assert config["model"]["class_path"].endswith(".CausalLMModule")
    assert (config["data"]["text"], config["data"]["label"]) == (text, label)


def test_what_exists_is_not_overwritten_and_what_is_missing_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--init", "nowhere.jsonl") == 2
    assert "there is no nowhere.jsonl" in capsys.readouterr().err
    (here / "numbers.jsonl").write_text('{"a": 1.5}\n{"a": 2.5}\n')
    assert run("fit", "--init", "numbers.jsonl") == 2
    assert "none of the columns ['a'] looks like a text; pass --text COLUMN" in capsys.readouterr().err
    data = write_csv(here)
    (here / "stream.yaml").write_text("mine: 1\n")
    assert run("fit", "--init", str(data)) == 2
    assert "stream.yaml exists; pass --to FILE, or delete it" in capsys.readouterr().err
    assert (here / "stream.yaml").read_text() == "mine: 1\n"


TEXTS = ["a b", "c d", "e f", "g h"]
DAYS = [f"2026-01-0{i}T10:00:00Z" for i in (1, 2, 3, 4)]
CODES, WORDS, KINDS = [f"{i}f-3" for i in range(4)], ["你好", "再见", "谢谢", "请问"], list("甲乙甲乙")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"w": [["a", "b"], ["c"]], "t": [["B-X", "E-X"], ["O"]]},
            ("token_classification", "w", "t", {"scheme": "BIOES"}),
        ),
        (
            {"text": ["in Cork", "no"], "found": [[{"start": 3, "end": 7, "label": "P"}], []]},
            ("token_classification", "text", "found", {}),
        ),
        (
            {"q": ["who?", "why?"], "text": ["a b c", "d e f"], "a": [[], [{"text": "d", "answer_start": 0}]]},
            ("question_answering", ["q", "text"], "a", {}),
        ),
        ({"prompt": ["say a", "say b"], "answer": ["yes", "no"]}, None),
        ({"text": ["a b", "c d"], "tags": [["O"], ["red"]]}, None),
        ({"text": ["a b", "c d"], "tags": [["B-1"], ["B-2"]]}, None),
    ],
)
def test_structures_are_found_by_their_values(columns: dict[str, list[Any]], expected: tuple[Any, ...] | None) -> None:
    found = find_structure(columns)
    assert (found and (found.task, found.text, found.label, found.module)) == expected


def test_a_label_that_is_named_makes_a_classifier() -> None:
    assert find_roles(PROMPTS).structure is not None
    roles = find_roles(PROMPTS, text="instruction", label="category")
    assert (roles.structure, roles.text, roles.label) == (None, "instruction", "category")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": [1, 2, 3, 4], "text": TEXTS, "label": [0, 1, 0, 1]}, ("text", "label", "id", None)),
        (
            {"body": TEXTS, "shop": list("xxyy"), "intent": list("pqpq"), "x": list("aabb")},
            ("body", "intent", None, None),
        ),
        ({"t": TEXTS, "why": list("ppqq"), "n": [0, 1, 0, 1]}, ("t", "why", None, None)),
        ({"when": DAYS, "t": TEXTS, "y": list("abab")}, ("t", "y", None, "when")),
        ({"t": TEXTS, "tags": [["x"], ["x", "y"], [], ["y"]]}, ("t", "tags", None, None)),
        ({"uuid": CODES, "文本": WORDS, "类别": KINDS}, ("文本", "类别", "uuid", None)),
    ],
)
def test_columns_are_found_by_their_values(columns: dict[str, list[Any]], expected: tuple[str | None, ...]) -> None:
    data = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    roles = find_roles(data)
    assert (roles.text, roles.label, roles.id, roles.time) == expected
    assert roles.multi_label == ("tags" in columns)


def test_splits_and_what_was_named() -> None:
    data = [
        {"s": "train" if i % 3 else "test", "a": f"text {i} x", "b": f"other {i} y", "c": "pq"[i % 2]} for i in range(9)
    ]
    roles = find_roles(data, text="b")
    assert (roles.split, roles.text, roles.label) == ("s", "b", "c")
    with pytest.raises(ValueError, match=r"there is no column 'z' for the label; there are \['a', 'b', 'c', 's'\]"):
        find_roles(data, label="z")
