"""The code in the documents runs: Python as shown, configurations and command lines through their parsers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
import yaml

from evertune.callbacks import Replay
from evertune.cli import main as cli
from evertune.cli.init import init_parser
from evertune.cli.space import read_space
from evertune.gate.verdict import State
from evertune.launch.settings import read_settings
from evertune.registry.aliases import ALIASES
from tests.helpers import live_worker
from tests.helpers.generation import QUESTIONS, records, tiny_llama, tiny_t5
from tests.helpers.lightning_modules import TEXTS
from tests.helpers.processes import Command
from tests.test_examples import example

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
DOCUMENTS += ["examples/live/README.md"]

NOT_RUN = {
    "# month.py": "a script: test_next_month_in_a_new_process runs it",
    "# tests/": "a line of a file of the tests",
    "from avalanche": "has an environment of its own: tests/avalanche/test_docs.py",
    "from evertune.training.checkpoint import": "resumes a killed run under DeepSpeed: tests/training/test_elastic.py",
}
"""Blocks of Python, by how they begin, that are not run here, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(document, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def of_language(language: str) -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document) if block.language == language]


def not_run(block: Block) -> bool:
    return any(block.text.startswith(start) for start in NOT_RUN)


# --- Python


def texts(path: Path, labels: list[str], n: int) -> None:
    words = [text for kind in TEXTS.values() for text in kind]
    rows = [
        {"text": f"{words[i % len(words)]} {label}", "label": label, "intent": label}
        for label in labels
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(path: Path) -> None:
    rows = [
        {"product": topic, "question": one["prompt"], "answer": one["answer"]}
        for topic in QUESTIONS
        for one in records(topic, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents read: a small model under the name of a large one, data, a registry."""
    folder = tmp_path_factory.mktemp("stage")
    live_worker.prepare(folder)
    shutil.copytree(folder / "bert", folder / "bert-base-uncased")
    live_worker.feed(folder, "first", ["business", "sport", "politics"], 60)
    assert live_worker.run(str(folder))["version"] == 1
    shutil.copytree(folder / "registry", folder / "news-registry")
    texts(folder / "intents.jsonl", [f"intent-{number}" for number in range(10)], 10)
    texts(folder / "reviews.jsonl", ["a", "b", "c"], 20)
    for name, make in (("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_llama), ("google-t5/t5-small", tiny_t5)):
        make(folder / name)
    questions(folder / "questions.jsonl")
    return folder


def stand_ins() -> dict[str, Any]:
    """The names that the documents leave to the reader."""
    vision = example("embed_vision")
    replay = Replay(memory_size=50)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[replay])
    trainer.fit(vision.ConvNet(), vision.load(range(5))[0])
    return {
        "my_module": vision.ConvNet(),
        "this_month": vision.load(range(5))[0],
        "next_month": vision.load(range(5, 10))[0],
        "january_test_loader": vision.load(range(5))[1],
        "replay": replay,
        "ids": replay.memory.ids[:2],
        "confidences": [0.9, 0.6],
        "late_ids": replay.memory.ids[:1],
        "correct": [True],
        "batches": [TEXTS["sport"] * 100, TEXTS["politics"] * 100],
    }


WITH_PYTHON = [name for name in DOCUMENTS if any(b.language == "python" and not not_run(b) for b in blocks(name))]
WITH_PYTHON.remove("docs/tutorial.md")  # takes a minute, as a notebook: tests/test_tutorial.py


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs(document: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(stage, tmp_path / "stage")
    monkeypatch.chdir(tmp_path / "stage")
    namespace = stand_ins()
    for block in blocks(document):
        if block.language == "python" and not not_run(block):
            code = compile(
                "\n" * block.line + block.text, str(ROOT / document), "exec"
            )  # so that tracebacks point there
            exec(code, namespace)


def test_every_exception_is_needed() -> None:
    starts = [start for start in NOT_RUN if not any(block.text.startswith(start) for block in of_language("python"))]
    assert not starts


# --- configurations and commands


@pytest.fixture
def configured(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copy("examples/stream.yaml", "stream.yaml")
    shutil.copy("examples/live/live.yaml", "live.yaml")
    return tmp_path


WITH_PARSER = ["compare", "drift", "export", "forget", "keys", "pending", "plan", "predict", "quarantine", "serve"]
WITH_PARSER += ["explain", "review", "tune", "ui"]
"""Commands whose parser is that of their module."""


def check(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Let the parser of a command read its arguments, and run nothing."""
    command, arguments = words[0], words[1:]
    if "--init" in arguments:
        init_parser(command).parse_args(arguments)
    elif command in ("fit", "update", "watch", "distil"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["update" if command == "watch" else command, *arguments, "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err
    elif command == "launch":
        at = words.index("--")
        read_settings(words[2:at], words[at + 1 :], words[1])
        check(words[at + 1 :], monkeypatch, capsys)
    elif command in WITH_PARSER:
        run = getattr(import_module(f"evertune.cli.{command}"), command)
        import_module(run.__module__)._parser().parse_args(arguments)
    else:
        read: list[Namespace | Path] = []
        monkeypatch.setattr(cli, "run_registry", read.append)
        monkeypatch.setattr("evertune.reports.write.make_report", lambda history, *_: read.append(history))
        try:
            cli.main(words)
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        assert len(read) == 1


def commands(block: Block) -> Iterator[list[str]]:
    """The lines of a shell block as words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ ").removesuffix("&"), comments=True):
            yield words


SCRIPTS = {block.text.split()[1] for block in of_language("python") if re.match(r"# \w+\.py", block.text)}
"""Files that a document shows whole."""

SHELL = [block for block in of_language("sh") if "evertune " in block.text or ".py" in block.text]
SHELL += [block for block in of_language("") if block.text.startswith("$ evertune ")]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_understood(
    block: Block, configured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(block) if block.language else [next(commands(block))]:
        if words[0] == "evertune":
            check(words[1:], monkeypatch, capsys)
        for word in words:
            assert not word.endswith(".py") or word in SCRIPTS or (ROOT / word).is_file(), f"{word} does not exist"


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda block: block.place)
def test_configurations_are_understood(
    block: Block, configured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("block.yaml").write_text(block.text)
    if block.text.startswith("# space.yaml"):
        read_space(yaml.safe_load(block.text))
        return
    sections = yaml.safe_load(block.text).keys() - {"preset"}
    fit = ["fit", "--config", "stream.yaml", "--config", "block.yaml"]
    if "launch" in sections:
        where = next((name for name in ("slurm", "kubernetes", "torchrun") if name in block.text), "local")
        check(["launch", where, "--", *fit], monkeypatch, capsys)
    elif sections <= {"model", "data", "trainer", "out"}:
        check(fit, monkeypatch, capsys)
    elif sections & {"server", "access"}:
        check(["serve", "--config", "block.yaml"], monkeypatch, capsys)
    else:
        check(["update", "--config", "live.yaml", "--config", "block.yaml"], monkeypatch, capsys)


# --- next month


MY_PROJECT = """
from embed_vision import ConvNet as MyModule, load

def data_of(month):
    return load(range(5) if month == "2026-01" else range(5, 10))[0]
"""


def test_next_month_in_a_new_process_does_not_forget(tmp_path: Path) -> None:
    (script,) = [block.text for block in blocks("README.md") if block.text.startswith("# month.py")]
    (tmp_path / "month.py").write_text(script)
    (tmp_path / "my_project.py").write_text(MY_PROJECT)
    shutil.copy(ROOT / "examples/embed_vision.py", tmp_path)
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    vision = example("embed_vision")
    accuracy = []
    for months in (["2026-01"], ["2026-02", "2026-01"]):
        done = Command(tmp_path, "month.py", *months, environment=environment).wait()
        assert done.returncode == 0, done.stderr[-4000:]
        module = vision.ConvNet()
        module.load_state_dict(torch.load(tmp_path / months[0] / "weights.pt", weights_only=True))
        accuracy.append([vision.accuracy(module, vision.load(digits)[1]) for digits in (range(5), range(5, 10))])
    (old_then, _), (old_now, new_now) = accuracy
    assert old_then > 0.9
    assert old_now > old_then - 0.1
    assert new_now > 0.8


def test_each_promise_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/promises.md").read_text())
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).is_file(), (file, test)


def test_the_glossary_has_every_word_that_messages_use() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text()
    explained = " ".join(re.findall(r"^\| (.+) \| .+ \|$", glossary, flags=re.MULTILINE))
    for word in ("experience", "update", "version", "slice", *ALIASES):
        assert re.search(rf"\b{word}\b", explained), word
    assert all(state in glossary for state in get_args(State)), "the results of a check"
