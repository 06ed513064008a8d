"""The version in production, loaded, followed and swapped."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.lightning_modules import SequenceClassificationModule
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.serving import Served, load
from evertune.registry.version import Version
from tests.helpers.lightning_modules import tiny_bert

TEXTS = ["the bank share", "goal match of the team", "vote"]
CLASSES = {1: ["business", "sport"], 2: ["business", "sport", "politics"], 3: ["film", "law"]}


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> dict[int, Path]:
    """Three saved modules with different classes."""
    folder = tmp_path_factory.mktemp("modules")
    backbone = tiny_bert(folder / "bert")
    for number, classes in CLASSES.items():
        torch.manual_seed(number)
        module = SequenceClassificationModule(backbone, classes=classes)
        module.configure_model()
        module.save_pretrained(folder / str(number))
    return {number: folder / str(number) for number in CLASSES}


@pytest.fixture
def registry(tmp_path, modules) -> Registry:
    """Three versions, the first in production."""
    registry = Registry(tmp_path / "registry")
    for number, folder in modules.items():
        publish(registry, tmp_path, {file.name: file.read_bytes() for file in folder.iterdir()})
        assert registry.versions()[-1].number == number
    registry.promote(1)
    return registry


def publish(registry: Registry, tmp_path: Path, model: dict[str, bytes], **manifest: Any) -> Version:
    folder = tmp_path / "staging"
    (folder / "model").mkdir(parents=True)
    for name, content in model.items():
        (folder / "model" / name).write_bytes(content)
    number = registry.next_number()
    about = Manifest(version=number, parent=number - 1 or None, module="SequenceClassificationModule")
    return registry.publish(folder, replace(about, **manifest))


def weights(registry: Registry, number: int) -> Path:
    return registry.version(number).folder() / "model" / "model.safetensors"


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "evertune-follow"]


class Slow:
    """A module that is no torch module; its answers wait."""

    gate = threading.Event()
    began = threading.Event()

    def __init__(self, answer: str) -> None:
        self.answer = answer

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Slow:
        return cls(json.loads((Path(directory) / "answer.json").read_text()))

    def predict(self, texts: list[str], wait: bool = False) -> list[str]:
        if wait:
            self.began.set()
            assert self.gate.wait(30)
        return [self.answer for _ in texts]


# --- loading


def test_production_is_loaded_ready_to_predict(registry, modules):
    served = load(registry.store.root, device="cpu")
    assert served.version.number == 1
    expected = SequenceClassificationModule.from_pretrained(modules[1]).predict(TEXTS)
    assert served.predict(TEXTS) == expected
    assert served.predict(TEXTS, batch_size=1, max_length=3) != expected
    assert isinstance(served.module, SequenceClassificationModule)
    assert not any(module.training for module in served.module.modules())
    assert not any(parameter.requires_grad for parameter in served.module.parameters())
    assert not followers()


def test_a_version_answers_in_bf16(registry):
    exact, fast = load(registry, device="cpu"), load(registry, device="cpu", precision="bf16")
    assert {parameter.dtype for parameter in fast.module.parameters()} == {torch.bfloat16}
    for one, other in zip(exact.predict(TEXTS), fast.predict(TEXTS), strict=True):
        assert other == pytest.approx(one, abs=0.02)
        assert sum(other.values()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="precision must be one of 32, bf16, got 'fp8'"):
        load(registry, precision="fp8")


def test_a_version_is_loaded_by_any_name(registry):
    registry.promote(2)
    registry.set_refused(3)
    names = ["production", "previous", "refused", 3, "2"]
    assert [load(registry, name).version.number for name in names] == [2, 1, 3, 3, 2]


def test_a_registry_behind_a_url(tmp_path, modules):
    registry = Registry(f"memory://serving/{tmp_path.name}", cache=tmp_path / "cache")
    model = {file.name: file.read_bytes() for file in modules[2].iterdir()}
    registry.promote(publish(registry, tmp_path, model).number)
    served = load(registry)
    assert list(served.predict(TEXTS)[0].keys() ^ set(CLASSES[2])) == []


def test_the_weights_are_in_memory_of_their_own(registry):
    served = load(registry, device="cpu")
    expected = served.predict(TEXTS)
    assert registry.store.root not in Path("/proc/self/maps").read_text()
    weights(registry, 1).write_bytes(b"")
    for path in sorted((registry.version(1).folder() / "model").iterdir()):
        path.unlink()
    assert served.predict(TEXTS) == expected


def test_what_is_not_there_is_said(tmp_path, modules):
    root = tmp_path / "registry"
    with pytest.raises(RegistryError, match="holds no versions: check the path, or make the first one"):
        load(root)
    assert not root.exists()
    registry = Registry(root)
    publish(registry, tmp_path, {"x": b""})
    with pytest.raises(RegistryError, match=r"no production version yet: promote one of \[1\] with `evertune registry"):
        load(registry)
    with pytest.raises(RegistryError, match="no version 9; it has 1"):
        load(registry, 9)
    with pytest.raises(ValueError, match=r"production, previous, refused or the number of a version, got 'latest'"):
        load(registry, "latest")


def test_settings_that_make_no_sense_are_refused(registry):
    with pytest.raises(ValueError, match="follow must be a positive number of seconds, or None, got 0"):
        load(registry, follow=0)
    with pytest.raises(ValueError, match="version 1 never changes, so there is nothing to follow"):
        load(registry, 1, follow=5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"!"), "model.safetensors does not match its sha256"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "model.safetensors does not match its sha256"),
        (lambda file: file.unlink(), "model/model.safetensors is missing"),
        (lambda file: file.with_name("adapter_config.json").write_text("{}"), "adapter_config.json is not in its mani"),
    ],
    ids=["one byte", "cut short", "missing", "added"],
)
def test_a_damaged_version_is_refused_by_the_name_of_its_file(registry, damage, words):
    damage(weights(registry, 1))
    with pytest.raises(RegistryError, match=words) as caught:
        load(registry)
    assert "version 1 of" in str(caught.value)
    assert f"evertune registry rollback {registry.store.root}" in str(caught.value)


@pytest.mark.parametrize("name", ["Slow", "os.system", "ClassifierOutput", "LinearHead", None])
def test_only_own_modules_are_loaded_by_name(tmp_path, name):
    registry = Registry(tmp_path / "registry")
    registry.promote(publish(registry, tmp_path, {"answer.json": b'"yes"'}, module=name).number)
    with pytest.raises(RegistryError, match=r"not a built-in module .* pass its class as module_class="):
        load(registry)
    assert load(registry, module_class=Slow).predict(TEXTS) == ["yes"] * 3


# --- following


def test_a_request_under_way_finishes_on_the_old_version_which_is_then_gone(tmp_path):
    registry = Registry(tmp_path / "registry")
    for answer in ("old", "new"):
        publish(registry, tmp_path, {"answer.json": json.dumps(answer).encode()})
    registry.promote(1)
    served, answers = load(registry, module_class=Slow), []
    old = weakref.ref(served.module)
    request = threading.Thread(target=lambda: answers.append(served.predict(["?"], wait=True)))
    request.start()
    assert Slow.began.wait(30)
    registry.promote(2)
    assert served.refresh()
    assert served.predict(["?"]) == ["new"]
    assert not answers
    assert old() is not None
    Slow.gate.set()
    request.join()
    assert answers == [["old"]]
    assert old() is None
    assert not served.refresh()


def test_every_answer_is_of_one_version_while_versions_change(registry, modules):
    expected = {n: SequenceClassificationModule.from_pretrained(folder) for n, folder in modules.items()}
    whole = {n: module.predict(TEXTS) for n, module in expected.items()}
    short = {n: module.predict(TEXTS, max_length=3) for n, module in expected.items()}
    done, seen, failures = threading.Event(), set(), []

    def ask(served: Served, max_length: int | None) -> None:
        answers = short if max_length else whole
        while not done.is_set():
            answering = served.answering
            answer = answering.predict(TEXTS, max_length=max_length)
            if answer != answers[answering.version.number] or served.predict(TEXTS) not in whole.values():
                failures.append((answering.version.number, answer))
            seen.add(answering.version.number)

    with load(registry, follow=0.01) as served:
        threads = [threading.Thread(target=ask, args=(served, length)) for length in (None, 3, None, 3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            for number in (2, 3, 1):
                registry.promote(number)
                until(lambda: served.version.number == number and number in seen)  # noqa: B023
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert seen == {1, 2, 3}
    assert not followers()


def test_a_damaged_version_never_takes_over(registry, caplog):
    served = load(registry)
    expected = served.predict(TEXTS)
    registry.promote(2)
    whole = weights(registry, 2).read_bytes()
    weights(registry, 2).write_bytes(whole[:-1] + b"!")
    with pytest.raises(RegistryError, match=r"version 2 of .* is damaged: model/model\.safetensors"):
        served.refresh()
    assert (served.version.number, served.predict(TEXTS)) == (1, expected)

    looks = []
    look = served._look
    served._look = lambda: (look(), looks.append(served.problem))
    with caplog.at_level(logging.WARNING, "evertune"), served:
        served.follow(0.005)
        until(lambda: len(looks) > 5)
        assert all("model/model.safetensors does not match its sha256" in problem for problem in looks)
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("version 2 is not loaded, version 1 stays: RegistryError: version 2 of")
        assert served.predict(TEXTS) == expected
        registry.rollback()
        until(lambda: served.problem is None)
        assert served.version.number == 1
        weights(registry, 2).write_bytes(whole)
        registry.promote(2)
        until(lambda: served.version.number == 2)
        assert served.problem is None
    assert len(caplog.messages) == 1


def test_aliases_that_cannot_be_read_for_a_while_change_nothing(registry, caplog):
    aliases = Path(registry.store.root) / "aliases.json"
    whole = aliases.read_bytes()
    with caplog.at_level(logging.WARNING, "evertune"), load(registry, follow=0.005) as served:
        aliases.write_bytes(whole[:20])
        until(lambda: served.problem is not None)
        assert "aliases.json is damaged or cut short" in served.problem
        aliases.write_bytes(whole)
        until(lambda: served.problem is None)
        registry.promote(3)
        until(lambda: served.version.number == 3)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("production is not loaded, version 1 stays")


def test_a_callback_hears_of_changes_and_its_errors_stop_nothing(registry, caplog):
    heard = []

    def on_change(version: Version) -> None:
        heard.append(version.number)
        if version.number == 2:
            raise RuntimeError("no route to the dashboard")

    with load(registry, follow=0.005, on_change=on_change) as served:
        for number in (2, 3):
            registry.promote(number)
            until(lambda: heard[-1:] == [number])  # noqa: B023
        assert served.version.number == 3
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "on_change failed at version 2"
    ]


def test_the_thread_ends_with_what_it_serves(registry):
    served = load(registry, follow=60)
    (thread,) = followers()
    served.close()
    served.close()
    assert not thread.is_alive()
    assert served.predict(TEXTS)

    served.follow(60)
    (thread,) = followers()
    del served
    thread.join(30)
    assert not thread.is_alive()


def test_it_can_be_closed_by_its_own_callback(registry):
    closed = threading.Event()
    served = load(registry, follow=0.005, on_change=lambda version: (served.close(), closed.set()))
    registry.promote(2)
    assert closed.wait(30)
    until(lambda: not followers())
    assert served.version.number == 2


FOLLOWER = """
import sys
from evertune.registry.serving import load
assert "evertune.lightning_modules" not in sys.modules, "it is imported before it is needed"
say = lambda version: print(version.number, sorted(served.predict(["vote"])[0]), flush=True)
served = load(sys.argv[1], follow=0.01, on_change=say)
say(served.version)
sys.stdin.read()
print("end", flush=True)
"""


def test_another_process_promotes_and_rolls_back(registry):
    command = [sys.executable, "-c", FOLLOWER, registry.store.root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as follower:
        heard = [follower.stdout.readline()]
        for change in (lambda: registry.promote(2), lambda: registry.promote(3), registry.rollback):
            change()
            heard.append(follower.stdout.readline())
        rest, _ = follower.communicate("")
    assert [line.strip() for line in heard] == [f"{n} {sorted(CLASSES[n])}" for n in (1, 2, 3, 2)]
    assert (rest, follower.returncode) == ("end\n", 0)
