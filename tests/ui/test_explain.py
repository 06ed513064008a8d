"""The page on which a text is typed in, over a version that a real update has learned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from evertune.explain import explain
from evertune.registry.registry import Registry
from evertune.ui.app import application
from evertune.ui.explaining import Explaining
from evertune.ui.settings import UiSettings
from tests.helpers.live_worker import feed, prepare, updater
from tests.reports.test_stream import Page


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder: Path = tmp_path_factory.mktemp("explain")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=40)
    assert updater(folder).run().status == "promoted"
    return Registry(folder / "registry")


@pytest.fixture
def http(registry: Registry) -> TestClient:
    made = application(UiSettings(registry=registry.store.root))
    return TestClient(made, "http://localhost", raise_server_exceptions=False)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(text).text))


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_a_text_that_is_typed_in(registry: Registry, http: TestClient, method: str) -> None:
    assert "Why a version gives a text its label." in words(http.get("/explain").text)
    shown = http.get("/explain", params={"text": "the team <b>goal</b>", "method": method, "label": "sport"})
    found = explain(registry, text="the team <b>goal</b>", label="sport", method=method)  # type: ignore[arg-type]
    assert shown.status_code == 200 and "<b>goal</b>" not in shown.text
    said = words(shown.text)
    assert "Version 1: sport" in said and found.neighbours[0].text in said
    for part in found.parts:
        assert f"{part.text} {part.effect:+.3f}" in said


def test_what_cannot_be_explained_is_said_on_the_page(http: TestClient) -> None:
    for asked, problem in (
        ({"label": "film"}, "does not know the class 'film'; it knows"),
        ({"version": "9"}, "9"),
        ({"method": "magic"}, "method must be one of occlusion, integrated_gradients, attention_rollout, got 'magic'"),
        ({"text": "a" * 5_001}, "more than 5,000 characters"),
    ):
        shown = http.get("/explain", params={"text": "the team", **asked})
        assert shown.status_code == 200 and problem in words(shown.text)


def test_another_site_may_not_ask_and_one_is_explained_at_a_time(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"text": "the team"}
    assert http.get("/explain", params=asked, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    second: list[int] = []
    usual = Explaining._explained

    def nested(self: Explaining, asked: dict[str, str]) -> object:
        monkeypatch.setattr(Explaining, "_explained", usual)
        with self._turn:
            second.append(http.get("/explain", params=asked).status_code)
        return usual(self, asked)

    monkeypatch.setattr(Explaining, "_explained", nested)
    assert http.get("/explain", params=asked).status_code == 200
    assert second == [429]
