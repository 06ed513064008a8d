"""``evertune quarantine`` and ``evertune pending``, as an operator runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evertune.cli.main import main
from evertune.cli.pending import pending
from evertune.cli.quarantine import quarantine
from evertune.registry.registry import Registry
from tests.cli.test_update import CONFIG
from tests.helpers.live_worker import feed, prepare, updater


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with 30 pending records and 4 in quarantine."""
    prepare(tmp_path)
    (tmp_path / "live.yaml").write_text(CONFIG)
    feed(tmp_path, "a", ["business", "sport"], n=30, n_bad=2)
    rows = [{"id": f"t{i}", "text": "the team goal \x1b[2J[/x]", "topic": "sport"} for i in range(2)]
    (tmp_path / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    updater(tmp_path).intake()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_list_and_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quarantine(["list", "--registry", "registry"]) == 0
    words = out(capsys)
    assert "2  refused      field 'text': the text is empty" in words
    assert "field 'label' is missing; the record has 'topic' instead" in words
    assert "4 records are in quarantine" in words
    assert quarantine(["list", "--registry", "registry", "--reason", "missing", "--json"]) == 0
    found = json.loads(out(capsys))
    assert [row["id"] for row in found] == ["t0", "t1"]
    assert quarantine(["show", found[1]["reference"], "--registry", "registry"]) == 0
    shown = out(capsys)
    assert json.loads(shown)["record"]["topic"] == "sport"
    assert "\x1b" not in shown
    assert quarantine(["show", "--kind", "unreadable", "--registry", "registry"]) == 3
    assert quarantine(["show", "000077:1", "--registry", "registry"]) == 1
    assert "there is no 000077:1 in quarantine" in capsys.readouterr().err


def test_retry_under_the_schema_as_it_is_now(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quarantine(["retry", "--config", "live.yaml"]) == 3
    assert "0 of 4 records are pending again" in out(capsys)
    config = CONFIG.replace("schema: {id: id}", "schema: {id: id, label: topic}")
    (folder / "live.yaml").write_text(config)
    assert quarantine(["retry", "--config", "live.yaml", "--reason", "missing"]) == 0
    assert "2 of 2 records are pending again" in out(capsys)
    assert quarantine(["list", "--registry", "registry", "--json"]) == 0
    assert len(json.loads(out(capsys))) == 2


def test_drop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quarantine(["drop", "--registry", "registry"]) == 1
    assert "say which" in capsys.readouterr().err
    assert quarantine(["drop", "--kind", "refused", "--reason", "empty", "--registry", "registry"]) == 0
    assert "2 records are deleted from quarantine" in out(capsys)
    assert quarantine(["drop", "--all", "--registry", "registry"]) == 0
    assert quarantine(["drop", "--all", "--registry", "registry"]) == 3
    assert Registry(folder / "registry").store.list("quarantine") == []


def test_pending_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pending(["list", "--registry", "registry"]) == 0
    assert out(capsys) == "     30  segment 1, from a.jsonl\n30 records are pending\n"
    assert pending(["show", "--id", "a-3", "--registry", "registry", "--json"]) == 0
    assert json.loads(out(capsys))["id"] == "a-3"
    assert pending(["drop", "--registry", "registry"]) == 1
    assert pending(["drop", "--id", "a-3", "--id", "a-4", "--reason", "wrong label", "--registry", "registry"]) == 0
    assert pending(["drop", "--id", "a-3", "--registry", "registry"]) == 3
    out(capsys)
    assert pending(["list", "--registry", "registry", "--json"]) == 0
    assert json.loads(out(capsys)) == [{"segment": 1, "from": "a.jsonl", "records": 28}]
    assert quarantine(["list", "--kind", "dropped", "--registry", "registry"]) == 0
    assert "dropped by hand: wrong label" in out(capsys)
    assert quarantine(["retry", "--kind", "dropped", "--config", "live.yaml"]) == 0
    assert updater(folder).situation().n_pending == 30


@pytest.mark.parametrize("command", ["quarantine", "pending"])
def test_help_and_errors(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    words = out(capsys)
    assert "examples:" in words and "exit codes:" in words
    with pytest.raises(SystemExit) as ended:
        main([command, "list", "--registry", str(tmp_path / "none")])
    assert ended.value.code == 1
    assert "there is no registry at" in capsys.readouterr().err


def test_whoever_updates_has_the_lease(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Registry("registry").lease("a watch"):
        assert quarantine(["drop", "--all", "--registry", "registry"]) == 1
        assert pending(["drop", "--all", "--registry", "registry"]) == 1
    assert capsys.readouterr().err.count("a watch") == 2
