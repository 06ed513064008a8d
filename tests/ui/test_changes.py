"""What pages change, after a confirmation, with a token, and only where it is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from httpx import Response
from starlette.testclient import TestClient

from evertune.registry.registry import Registry
from evertune.serve.access import Access
from evertune.serve.keys import KeyFile
from evertune.serve.settings import AccessSettings
from tests.cli.test_update import CONFIG
from tests.helpers.live_worker import feed, prepare, updater
from tests.helpers.shown import EVIL, news, queue
from tests.ui.test_pages import client, words


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return news(tmp_path)


def fields_of(page: str) -> dict[str, str]:
    """The hidden fields of a form."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


def confirm(http: TestClient, path: str, **fields: str) -> Response:
    """Open a page that asks for confirmation, and confirm."""
    page = http.get(path)
    assert page.status_code == 200, page.text
    return http.post(path, data=fields_of(page.text) | fields, follow_redirects=False)


CHANGES = ["/versions/4/promote", "/rollback", "/quarantine/x/retry", "/review"]


@pytest.mark.parametrize("path", CHANGES)
def test_pages_that_only_show_refuse_every_change(registry: Registry, tmp_path: Path, path: str) -> None:
    before = registry.aliases
    http = client(registry, queue=str(queue(tmp_path / "queue.jsonl")), live="live.yaml")
    assert http.post(path, data={"token": "x"}).status_code == 403
    if path != "/review":
        answer = http.get(path)
        assert answer.status_code == 403 and "--allow_changes" in answer.text
    assert registry.aliases == before


@pytest.mark.parametrize("path", CHANGES)
def test_a_form_of_another_site_changes_nothing(registry: Registry, tmp_path: Path, path: str) -> None:
    before, file = registry.aliases, queue(tmp_path / "queue.jsonl")
    content = file.read_text()
    http = client(registry, queue=str(file), live="live.yaml", allow_changes=True)
    for data in ({"expected": "2"}, {"token": ""}, {"token": "0" * 64}, {"token": "\N{SNOWMAN}"}):
        assert http.post(path, data=data).status_code == 403
    elsewhere = fields_of(http.get("/versions/4/promote").text)["token"]
    if path != "/versions/4/promote":
        assert http.post(path, data={"token": elsewhere, "expected": "2"}).status_code == 403, "of another page"
    assert http.post(path, json={"token": elsewhere}).status_code == 415
    assert http.post(path, content=b"a=" + b"b" * (1 << 17), headers={"content-type": FORM}).status_code == 413
    assert http.post(path, content=b"token=%ff", headers={"content-type": FORM}).status_code in (400, 403)
    assert registry.aliases == before and file.read_text() == content


FORM = "application/x-www-form-urlencoded"


def test_a_token_is_that_of_one_client(registry: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    ann, bob = (keys.add(name, ["view", "change"]) for name in ("ann", "bob"))
    http = client(registry, Access(AccessSettings(keys=str(keys.path))), allow_changes=True)
    fields = fields_of(http.get("/rollback", auth=("", ann)).text)
    assert http.post("/rollback", data=fields, auth=("", bob)).status_code == 403
    assert http.post("/rollback", data=fields, auth=("", ann), follow_redirects=False).status_code == 303
    assert registry.events[-1]["by"] == "ann"


def test_promote_with_confirmation(registry: Registry) -> None:
    http = client(registry, allow_changes=True)
    assert 'href="/versions/4/promote"' in http.get("/versions/4").text
    page = http.get("/versions/4/promote")
    assert "It takes the place of version 2" in page.text
    answer = confirm(http, "/versions/4/promote", reason=f"asked {EVIL}")
    assert answer.status_code == 303 and answer.headers["location"] == "/versions/4"
    assert registry.aliases == {"production": 4, "previous": 2}
    assert registry.events[-1]["reason"] == f"asked {EVIL}" and "@" in registry.events[-1]["by"]
    shown = http.get("/").text
    assert "Version 4 is in production" in shown and "<script>alert" not in shown
    assert http.get("/versions/4/promote").status_code == 409
    assert http.get("/versions/9/promote").status_code == 404


def test_a_refused_version_needs_a_second_word(registry: Registry) -> None:
    http = client(registry, allow_changes=True)
    assert "The gate refused it" in http.get("/versions/3/promote").text
    answer = confirm(http, "/versions/3/promote")
    assert answer.status_code == 409 and "was refused" in words(answer.text)
    assert registry.aliases["production"] == 2
    assert confirm(http, "/versions/3/promote", force="1").status_code == 303
    assert registry.aliases["production"] == 3


def test_a_damaged_version_is_not_promoted(registry: Registry) -> None:
    registry.store.write("versions/4/model/model.safetensors", b"other")
    answer = confirm(client(registry, allow_changes=True), "/versions/4/promote")
    assert answer.status_code == 409 and "is damaged and not promoted" in words(answer.text)
    assert registry.aliases["production"] == 2


def test_a_decision_does_not_overrule_one_made_meanwhile(registry: Registry) -> None:
    http = client(registry, allow_changes=True)
    promotion, rollback = fields_of(http.get("/versions/4/promote").text), fields_of(http.get("/rollback").text)
    registry.promote(4, verify=False)
    registry.promote(1, verify=False)
    for path, fields in (("/versions/4/promote", promotion), ("/rollback", rollback)):
        answer = http.post(path, data=fields, follow_redirects=False)
        assert answer.status_code == 409 and "by now" in words(answer.text)
    assert registry.aliases == {"production": 1, "previous": 4}


def test_roll_back_once_though_it_is_sent_twice(registry: Registry) -> None:
    registry.promote(4, verify=False)
    http = client(registry, allow_changes=True)
    page = http.get("/rollback")
    assert "Version 4 leaves production at once." in words(page.text)
    assert "61 records that version 2 had not learned are pending again" in words(page.text)
    fields = fields_of(page.text) | {"reason": "readers complain", "discard": "1"}
    assert http.post("/rollback", data=fields, follow_redirects=False).headers["location"] == "/"
    assert registry.aliases == {"production": 2, "previous": 1} and [one.version for one in registry.given_up] == [4]
    assert http.post("/rollback", data=fields).status_code == 409
    assert registry.aliases == {"production": 2, "previous": 1}
    registry.promote(1, verify=False)
    registry.rollback()
    registry.rollback()
    assert http.get("/rollback").status_code == 409


def test_changes_are_possible_while_a_watch_holds_the_lease(registry: Registry) -> None:
    with Registry(registry.store.root).lease("evertune watch"):
        assert confirm(client(registry, allow_changes=True), "/rollback").status_code == 303


def test_labels_are_filled_in(registry: Registry, tmp_path: Path) -> None:
    file = queue(tmp_path / "queue.jsonl")
    http = client(registry, queue=str(file), allow_changes=True)

    def labels() -> list[object]:
        return [json.loads(line)["label"] for line in file.read_text().splitlines()]

    token = fields_of(http.get("/review").text)["token"]
    names = re.findall(r'<article class="card" id="r-(\w+)">', http.get("/review").text)

    def send(place: int, **fields: str) -> Response:
        data = {"token": token, "name": names[place], **fields}
        return http.post("/review", data=data, follow_redirects=False)

    assert send(0, as_suggested="1").headers["location"] == f"/review?page=1#r-{names[0]}"
    assert send(1, label=" b , c,").status_code == send(2, as_suggested="1").status_code == 303
    assert labels() == [EVIL, ["b", "c"], [{"start": 0, "end": 3, "label": "PER"}]]
    assert "3 of 3 records have a label" in words(http.get("/review").text)
    assert send(0, label="").status_code == send(1, label="").status_code == 303
    assert labels()[:2] == [None, None]
    assert send(2, label="PER").status_code == 409
    file.write_text(file.read_text().split("\n", 1)[1])
    answer = send(0, label="sport")
    assert answer.status_code == 409 and "was taken meanwhile" in words(answer.text)


def test_quarantined_records_are_checked_again_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    (tmp_path / "live.yaml").write_text(CONFIG.replace("schema: {id: id}", "schema: {id: id, label: topic}"))
    feed(tmp_path, "a", ["business", "sport"], n=10, n_bad=2)
    rows = [{"id": f"t{i}", "text": "the team goal", "topic": "sport"} for i in range(2)]
    (tmp_path / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    live = updater(tmp_path)
    live.intake()
    monkeypatch.chdir(tmp_path)
    registry = Registry(tmp_path / "registry")
    http = client(registry, allow_changes=True, live="live.yaml")
    page = http.get("/quarantine").text
    groups = dict(
        zip(re.findall(r"</span> (.*?)</h2>", page), re.findall(r"/quarantine/(\w+)/retry", page), strict=True)
    )
    (group,) = (name for reason, name in groups.items() if "topic" in reason)
    with registry.lease("evertune watch"):
        answer = confirm(http, f"/quarantine/{group}/retry")
        assert answer.status_code == 409 and "evertune watch" in words(answer.text)
    answer = confirm(http, f"/quarantine/{group}/retry")
    assert answer.status_code == 200 and "2 of 2 records are pending again" in words(answer.text)
    assert live.situation().n_pending == 12
    assert http.get(f"/quarantine/{group}/retry").status_code == 404
    assert "--live" in client(registry, allow_changes=True).get(f"/quarantine/{group}/retry").text
