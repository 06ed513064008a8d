"""Every page, in this process: what it shows, what it escapes, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from starlette.testclient import TestClient

from evertune.live.plan import Plan
from evertune.live.staging import claim, finish
from evertune.registry.registry import Registry
from evertune.serve.access import Access
from evertune.serve.keys import KeyFile
from evertune.serve.settings import AccessSettings
from evertune.ui.app import application
from evertune.ui.progress import Live
from evertune.ui.rendering import Templates
from evertune.ui.settings import UiSettings
from tests.helpers.shown import CLASSES, EVIL, FOREIGN, news, queue
from tests.reports.test_stream import Page

PAGES = [
    "/",
    "/?all=1",
    "/versions/2",
    "/versions/3",
    "/drift",
    "/update",
    "/explain",
    "/quarantine",
    "/pending",
    "/review",
]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return news(tmp_path)


def client(registry: Registry, access: Access | None = None, **settings: object) -> TestClient:
    made = UiSettings(registry=registry.store.root, **settings)  # type: ignore[arg-type]
    return TestClient(application(made, access), "http://localhost", raise_server_exceptions=False)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(text).text))


def test_the_versions_and_what_became_of_them(registry: Registry) -> None:
    shown = words(client(registry).get("/").text)
    assert "Version 2 is in production: " in shown
    assert "4 2026-03-05 06:00 not promoted 200 records are pending" in shown
    assert "3 2026-03-04 06:00 refused" in shown
    assert "on 'update-1' the new version is right on 60.0 % of 24 held-out records" in shown
    assert "1 2026-03-02 06:00 promoted previous" in shown
    assert "Records pending 61 wait for the next update" in shown
    assert "Roll back" not in shown, "read-only pages offer no change"


def test_one_version_with_its_slices_its_verdict_and_its_answers(registry: Registry) -> None:
    shown = words(client(registry).get("/versions/3").text)
    assert "Version 3" in shown and "Because drift: 0.31 above 0.05" in shown
    assert "Refused: 3 checks, 1 refused, 1 cannot tell." in shown
    assert "forgetting update-1 90.0 % 60.0 % 2.0 points less 0.004 refused" in shown
    assert "cannot tell: 24 records are too few" in shown
    assert "Class Found, % Right when said, % Records" in shown
    assert f"sport → {CLASSES[1]}" in shown
    assert "update-3" in shown and "update-4" not in shown
    assert "What happened to it Refused " in shown


def test_wrong_answers_are_browsed_by_label_answer_and_suspicion(registry: Registry) -> None:
    http = client(registry)

    def articles(**asked: str) -> str:
        text = http.get("/versions/4", params=asked).text
        start = text.index('<div class="card errors">')
        return words(text[start : text.index("</section>", start)])

    found = re.findall(r"(\d-\d+) · update-\d", articles())
    assert 10 < len(found) <= 25
    some = articles(label="sport", predicted="tech")
    assert "sport , answered tech" in some and "tech , answered art" not in some
    assert set(re.findall(r"label suspect", articles(suspect="1"))) == {"label suspect"}
    assert articles(label="none").startswith("None.")
    assert articles(page="99") == articles(page="1") or "of 2" in articles(page="99")
    for page in ("x", "-1", "9" * 30):
        assert http.get("/versions/4", params={"page": page}).status_code == 200


def test_drift_over_time(registry: Registry) -> None:
    shown = words(client(registry).get("/drift").text)
    assert "New records, before they were learned" in shown
    row = re.search(
        r"2 2026-03-03 06:00 200 records are pending ([\d.]+) ([\d.]+) \N{MINUS SIGN}([\d.]+) ([\d.]+)", shown
    )
    assert row is not None
    past, new, gap, learned = map(float, row.groups())
    assert gap == pytest.approx(past - new, abs=0.11) and learned == pytest.approx(new + 20.0, abs=0.11)
    assert "Labels over time" in shown and "update-1 33.3" in shown


def test_quarantine_and_pending(registry: Registry) -> None:
    http = client(registry)
    quarantine, pending = words(http.get("/quarantine").text), words(http.get("/pending").text)
    assert "4 records are in quarantine, for 2 reasons" in quarantine
    assert "field 'label':" in quarantine and "not JSON" in quarantine
    assert "Check" not in quarantine
    assert "61 records wait for the next update" in pending
    assert "inbox/4.jsonl 4 60" in pending and "1 of 2" in pending
    assert "p4-59" not in pending and "p4-59" in words(http.get("/pending?page=2").text)


def test_the_review_queue(registry: Registry, tmp_path: Path) -> None:
    assert "evertune review choose --registry" in client(registry).get("/review").text
    http = client(registry, queue=str(queue(tmp_path / "queue.jsonl")))
    shown = words(http.get("/review").text)
    assert "0 of 3 records have a label" in shown
    assert f"Suggested: {EVIL} sure by 0.0 %" in shown
    assert '"label": "PER"' in shown
    assert "As suggested" not in shown
    (tmp_path / "queue.jsonl").write_text("{")
    assert http.get("/review").status_code == 500
    assert client(registry, queue=str(tmp_path / "none")).get("/review").status_code == 500


# --- escaping and headers


@pytest.mark.parametrize("path", PAGES)
def test_nothing_foreign_becomes_markup_or_a_control_character(registry: Registry, tmp_path: Path, path: str) -> None:
    http = client(registry, queue=str(queue(tmp_path / "queue.jsonl")), allow_changes=True, live="live.yaml")
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    page = Page(answer.text)
    assert page.count("script") == 1, "only our own"
    assert not page.count("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", answer.text)
    assert not re.search(r"(src|href|action)=[\"']?(https?:)?//", answer.text), "nothing from elsewhere"
    if path not in ("/", "/?all=1", "/update", "/drift", "/explain"):
        assert "<script>alert(1)</script>" in "".join(page.text) and "[/x]" in answer.text
        assert r"\x1b[31mred\u202e" in answer.text


def test_strict_headers_on_every_answer(registry: Registry) -> None:
    http = client(registry)
    for path in [*PAGES, "/style.css", "/script.js", "/none", "/versions/99"]:
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "style-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert http.get("/style.css").headers["content-type"].startswith("text/css")
    assert http.get("/script.js").headers["content-type"].startswith("text/javascript")
    for path in PAGES:
        text = http.get(path).text
        assert "<style" not in text and not re.search(r"<script(?! src=\"/script.js\" defer>)", text)


# --- what is damaged


def test_a_broken_version_leaves_the_list_and_the_others(registry: Registry) -> None:
    http = client(registry)
    registry.store.write("versions/3/manifest.json", b"{")
    shown = http.get("/")
    assert shown.status_code == 200
    assert "cannot be read" in shown.text and "damaged or cut short" in words(shown.text)
    assert "Version 2 is in production" in shown.text
    assert http.get("/versions/3").status_code == 500
    assert "damaged or cut short" in words(http.get("/versions/3").text)
    assert http.get("/versions/2").status_code == http.get("/drift").status_code == 200
    registry.store.write("versions/2/manifest.json", b"{")
    shown = client(registry).get("/")  # another server, which has not read it before
    assert shown.status_code == 200 and "Version 2 is in production, and cannot be read." in shown.text


@pytest.mark.parametrize("name", ["evaluation.json", "verdict.json"])
def test_a_damaged_file_of_a_version_is_named(registry: Registry, name: str) -> None:
    registry.store.write(f"versions/2/{name}", b"{")
    http = client(registry)
    shown = http.get("/versions/2")
    assert shown.status_code == 200 and f"{name} does not match its sha256" in words(shown.text)
    assert http.get("/drift").status_code == 200


def test_damaged_aliases_index_and_journal_are_named(registry: Registry) -> None:
    http = client(registry)
    registry.store.write("slices/index.jsonl", b"{")
    assert "is damaged" in words(http.get("/versions/2").text)
    registry.store.write("aliases.json", b"{")
    shown = http.get("/")
    assert shown.status_code == 200 and "Which version is in production cannot be read." in shown.text
    assert "aliases.json is damaged" in words(http.get("/update").text)
    registry.store.write("pending/000004.json", b"{")
    for path in ("/pending", "/quarantine"):
        answer = http.get(path)
        assert answer.status_code == 500 and "damaged" in words(answer.text)


def test_an_empty_registry_has_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    http = client(Registry(tmp_path / "empty"))
    assert "No version is in production yet." in http.get("/").text
    for path in ("/drift", "/update", "/quarantine", "/pending", "/review"):
        assert http.get(path).status_code == 200
    assert http.get("/versions/1").status_code == 404


# --- who may look


def test_only_requests_for_this_machine_are_answered(registry: Registry) -> None:
    http = client(registry)
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example", ""):
        answer = http.get("/", headers={"host": host})
        assert answer.status_code == 421 and "Version 2" not in answer.text
    for host in ("127.0.0.1:8080", "localhost", "[::1]:8080"):
        assert http.get("/", headers={"host": host}).status_code == 200


def test_a_browser_sends_a_key_as_its_password(registry: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    reader, other = keys.add("reader", ["view"]), keys.add("other", ["predict"])
    http = client(registry, Access(AccessSettings(keys=str(keys.path))), allow_changes=True)
    answer = http.get("/")
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")
    assert "Version 2" not in answer.text
    assert http.get("/", auth=("me", reader)).status_code == 200
    assert http.get("/", headers={"authorization": f"Bearer {reader}"}).status_code == 200
    for path in (*PAGES, "/events", "/style.css"):
        assert http.get(path, auth=("me", other)).status_code == 403
        assert http.get(path, auth=("me", "wrong")).status_code == 401
        assert http.get(path, headers={"authorization": "Basic \xff".encode("latin-1")}).status_code == 401
    assert http.post("/rollback", auth=("me", reader)).status_code == 403


# --- the update in progress


def plan(**changes: object) -> Plan:
    values: dict[str, object] = {"version": 5, "parent": 2, "kind": "update", "after": 2, "consumed": 4, "offset": None}
    values |= {"reason": f"drift {FOREIGN[2]}", "created": "2026-03-06T06:00:00+00:00", "config": "x", "records": 61}
    return Plan(**values | changes)  # type: ignore[arg-type]


def steps(registry: Registry, step: int) -> None:
    (registry.store.local("staging") / "steps.json").write_text(json.dumps({"step": step, "steps": 400}))


def test_an_update_is_followed_through_its_stages(registry: Registry) -> None:
    http, staging = client(registry), registry.store.local("staging")
    assert "No update is in progress." in http.get("/update").text
    plan().save(staging)
    assert "Update 5 was interrupted while preparing" in words(http.get("/update").text)
    assert "Update 5 was interrupted" in words(http.get("/").text)
    with registry.lease("evertune watch"):
        shown = words(http.get("/update").text)
        assert "Update 5 is preparing" in shown and "evertune watch (process " in shown
        claim(staging, plan())
        steps(registry, 120)
        shown = http.get("/update").text
        assert "Step 120 of 400" in words(shown) and '<progress max="400" value="120">' in shown
        assert r"drift \x1b[31mred\u202e" in shown
        finish(staging, plan(), 400, CLASSES, {})
        assert "Update 5 is judging" in words(http.get("/update").text)
        (staging / "version").mkdir()
        (staging / "version" / "verdict.json").write_text("{}")
        assert "Update 5 is publishing" in words(http.get("/update").text)
    (staging / "plan.json").write_text("{")
    shown = http.get("/update")
    assert shown.status_code == 200 and "is damaged" in words(shown.text)


def test_changes_are_sent_as_events(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.ui.progress._PAUSE", 0.01)
    monkeypatch.setattr("evertune.ui.progress._QUIET", 2)
    settings = UiSettings(registry=registry.store.root)
    live, ending = Live(registry, settings, Templates(registry, settings)), False

    async def follow() -> list[str]:
        nonlocal ending
        events = live.changes(lambda: ending)
        first = await anext(events)
        still = await anext(events)
        plan().save(registry.store.local("staging"))
        second = await anext(events)
        ending = True
        return [first, still, second, *[event async for event in events]]

    first, still, second = asyncio.run(follow())
    assert "No update is in progress." in first and still == ":\n\n" and "Update 5" in second
    for event in (first, second):
        assert event.endswith("\n\n") and all(line.startswith("data: ") for line in event.strip().split("\n"))


@pytest.fixture
def watch() -> Callable[[int, bytes], str]:
    def serve(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/healthz"
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    return serve


def test_the_watch_says_how_it_is(registry: Registry, watch: Callable[[int, bytes], str]) -> None:
    health = {"healthy": True, "why": [], "source": "ok", "readings": {"drift_score": 0.31, "drift_threshold": 0.05}}
    http = client(registry, watch=watch(200, json.dumps(health).encode()))
    assert "evertune watch is healthy ; source: ok" in words(http.get("/update").text)
    assert "drift score 0.31 drift threshold 0.05" in words(http.get("/drift").text)
    ill = health | {"healthy": False, "why": ["the last 3 updates failed"], "source": EVIL}
    shown = client(registry, watch=watch(503, json.dumps(ill).encode())).get("/update").text
    assert "is not healthy ; the last 3 updates failed; source: " in words(shown) and "<script>alert" not in shown
    assert "is not that of evertune watch" in client(registry, watch=watch(200, b"[1]")).get("/update").text
    assert "it does not answer" in client(registry, watch=watch(404, b"")).get("/update").text
    assert "it does not answer" in client(registry, watch="http://127.0.0.1:9").get("/update").text
    with pytest.raises(ValueError, match="watch must be an address"):
        UiSettings(registry="r", watch="file:///etc/passwd")


def test_an_update_on_another_machine(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    plan().save(tmp_path / "work")
    assert "Update 5" in client(registry, work_dir=str(tmp_path / "work")).get("/update").text
    assert UiSettings(registry="r").staging(Registry("memory://ui/none")) is None
