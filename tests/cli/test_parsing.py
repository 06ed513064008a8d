"""A misspelt setting or class is one line with what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evertune.cli.fit import fit
from evertune.cli.update import updater_from

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Changes = dict[str, Any]


def webhook(path: str = "evertune.live.alerts.Webhook", **init: Any) -> list[Any]:
    return [{"class_path": path, "init_args": {"url": "http://host", **init}}]


MISSPELT: dict[str, tuple[Changes, str]] = {
    "a section": ({"gates": {"max_drop": 0.1}}, "gate.max_drop"),
    "a setting of the watch": ({"watch": {"pol": 5}}, "poll"),
    "a setting of the gate": ({"gate": {"max_forgeting": 0.1}}, "max_forgetting"),
    "an option of the trainer": ({"trainer": {"max_epoch": 3}}, "max_epochs"),
    "a class": ({"trigger": {"class_path": "evertune.live.triggers.Volme"}}, "Volume"),
    "a class by its short name": ({"trigger": {"class_path": "Volme"}}, "Volume"),
    "a source": ({"source": {"class_path": "evertune.sources.folder.FoldrSource"}}, "FolderSource"),
    "an argument of a class": ({"trigger": {"class_path": "Volume", "init_args": {"min_recrds": 3}}}, "min_records"),
    "an alert": ({"watch": {"alerts": webhook("evertune.live.alerts.Webhok")}}, "Webhook"),
    "an argument of an alert": ({"watch": {"alerts": webhook(evnts=["drift"])}}, "events"),
    "a method": ({"trainer": {"callbacks": [{"class_path": "evertune.callbacks.Replya"}]}}, "Replay"),
    "an argument of a method": (
        {"trainer": {"callbacks": [{"class_path": "evertune.callbacks.Replay", "init_args": {"memory_siz": 3}}]}},
        "memory_size",
    ),
}


@pytest.mark.parametrize(("changes", "meant"), MISSPELT.values(), ids=MISSPELT)
def test_a_misspelt_name_in_a_configuration(
    changes: Changes, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(changes))
    with pytest.raises(SystemExit) as end:
        updater_from(["--config", str(EXAMPLES / "live" / "live.yaml"), "--config", str(tmp_path / "more.yaml")])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evertune")]
    assert line.startswith("evertune update: ") and f"did you mean {meant!r}? (see evertune update --help)" in line


@pytest.mark.parametrize(
    ("argument", "meant"),
    [("--registryy=x", "--registry"), ("--watch.pol=3", "--watch.poll"), ("--gate.max_drops=1", "--gate.max_drop")],
)
def test_a_misspelt_option(argument: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        updater_from(["--config", str(EXAMPLES / "live" / "live.yaml"), argument], "evertune watch")
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evertune")]
    assert f"did you mean {meant!r}? (see evertune watch --help)" in line


def test_other_errors_take_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--config", str(tmp_path / "gone.yaml")],
        ["--trainer.max_epochs", "many"],
        ["--nothing.like.it"],
    ):
        with pytest.raises(SystemExit) as end:
            fit(["--config", str(EXAMPLES / "stream.yaml"), *arguments])
        assert end.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evertune")]
        assert line.startswith("evertune fit: ") and line.endswith("(see evertune fit --help)")
        assert "did you mean" not in line


def test_the_help_of_the_watch_begins_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        updater_from(["--help"], "evertune watch")
    shown = capsys.readouterr().out
    first, last = shown.index("--watch.poll POLL"), shown.index("--trainer.max_epochs", 5_000)
    others = [shown.index(f"--{name} ", 5_000) for name in ("gate.max_forgetting", "update.holdout", "data.batch_size")]
    assert first < min(others) and max(others) < last
