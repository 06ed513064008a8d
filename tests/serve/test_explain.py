"""``POST /explain``: the answer of ``evertune explain``, to whom may have it, within limits."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from evertune.explain import explain
from evertune.explain.explainer import Explainer
from evertune.registry.registry import Registry
from evertune.serve import AccessSettings, LimitSettings, Service, application
from evertune.serve.access import Access
from evertune.serve.explaining import MOST_WAITING
from evertune.serve.keys import KeyFile
from tests.helpers.live_worker import feed, prepare, updater
from tests.helpers.served import Echo, echoes


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A version that a real update has learned, with a memory."""
    folder = tmp_path_factory.mktemp("explain")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=40)
    assert updater(folder).run().status == "promoted"
    return Registry(folder / "registry")


@pytest.fixture
def http(registry: Registry) -> Iterator[TestClient]:
    service = Service(registry, device="cpu", limits=LimitSettings(max_characters=100))
    with TestClient(application(service), "http://localhost", raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_it_says_what_the_command_says(registry: Registry, http: TestClient, method: Any) -> None:
    asked = {"text": "the team won a goal", "method": method, "neighbours": 3}
    found = http.post("/explain", json=asked)
    assert found.status_code == 200
    expected = explain(registry, text=asked["text"], method=method, n_neighbours=3).as_json()
    said = found.json()
    assert said.keys() == expected.keys()
    for name in ("text", "version", "label", "method", "flips"):
        assert said[name] == expected[name]
    assert [part["effect"] for part in said["parts"]] == pytest.approx(
        [part["effect"] for part in expected["parts"]], abs=1e-5
    )
    assert [one["id"] for one in said["neighbours"]] == [one["id"] for one in expected["neighbours"]]
    assert len(said["neighbours"]) == 3 and len(said["history"]) == 1
    again = http.post("/explain", json={**asked, "label": "business", "neighbours": 0}).json()
    assert (again["label"], again["neighbours"]) == ("business", [])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": " "}, "text is empty"),
        ({"text": "a", "label": "film"}, "does not know the class 'film'; it knows"),
        ({"text": "a" * 101}, "a text is too long"),
        ({"text": "a", "neighbours": 51}, "the body does not fit"),
        ({"text": "a", "method": "magic"}, "the body does not fit"),
        ({"text": ["a", "b"]}, "the body does not fit"),
    ],
)
def test_what_cannot_be_explained_is_refused(http: TestClient, body: dict[str, Any], words: str) -> None:
    found = http.post("/explain", json=body)
    assert found.status_code == 422 and words in found.json()["error"]


def test_scope_and_rate(registry: Registry, tmp_path: Path) -> None:
    keys = KeyFile(str(tmp_path / "keys.json"))
    only, may = keys.add("ann"), keys.add("bob", ["explain"], rate=4)
    access = Access(AccessSettings(keys=str(tmp_path / "keys.json")))
    with TestClient(application(Service(registry, device="cpu"), access), "http://localhost") as http:

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            asked = {"text": "the team " * 25, "neighbours": 0}
            return int(http.post("/explain", json=asked, headers=headers).status_code)

        assert http.post("/explain", json={"text": "a"}).status_code == 401
        assert status(only) == 403
        assert [status(may), status(may)] == [200, 429]  # of the first, 51 texts were answered


def test_a_version_that_was_deleted_since_it_was_loaded(registry: Registry, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(registry.store.root, tmp_path / "copy"))
    with TestClient(
        application(Service(Registry(copy), device="cpu")), "http://localhost", raise_server_exceptions=False
    ) as http:
        shutil.rmtree(copy / "versions/1")
        found = http.post("/explain", json={"text": "the team won"})
        assert found.status_code == 200 and len(found.json()["parts"]) == 3
        [words] = found.json()["missing"]
        assert words.startswith("nearest examples: the replay memory of version 1 was deleted since it was loaded")
        assert str(copy) not in words


def test_too_many_at_a_time(registry: Registry, http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, usual = threading.Event(), Explainer.explain

    def slowly(self: Explainer, *asked: Any) -> Any:
        assert gate.wait(60)
        return usual(self, *asked)

    monkeypatch.setattr(Explainer, "explain", slowly)
    with ThreadPoolExecutor(MOST_WAITING + 3) as clients:
        asked = {"text": "the team", "neighbours": 0}
        answers = [clients.submit(http.post, "/explain", json=asked) for _ in range(MOST_WAITING + 3)]
        while sum(one.done() for one in answers) < 3:
            pass
        refused = [one.result() for one in answers if one.done()]
        assert [one.status_code for one in refused] == [429] * 3
        assert all(int(one.headers["retry-after"]) > 1 for one in refused)
        assert http.post("/predict", json={"text": "the team"}).status_code == 200
        gate.set()
        assert sorted(one.result().status_code for one in answers) == [200] * MOST_WAITING + [429] * 3


def test_a_module_without_a_tokenizer_and_none_yet(tmp_path: Path) -> None:
    service = Service(echoes(tmp_path, ["old"]), module_class=Echo)
    with TestClient(application(service), "http://localhost", raise_server_exceptions=False) as http:
        found = http.post("/explain", json={"text": "a"})
        assert found.status_code == 422 and "Echo has no tokenizer" in found.json()["error"]
    service = Service(Registry(tmp_path / "empty"), wait=True)
    with TestClient(application(service), "http://localhost", raise_server_exceptions=False) as http:
        assert http.post("/explain", json={"text": "a"}).status_code == 503
