"""Launchers, sources, triggers and methods of other packages, found by their entry points."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evertune.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
LIVE = str(ROOT / "examples" / "live" / "live.yaml")

PACKAGE = '''
from evertune.callbacks.base import ContinualCallback
from evertune.live.triggers import Volume
from evertune.sources.base import Source


class AcmeSource(Source):
    """Records of Acme."""

    def __init__(self, table: str) -> None:
        self.table = table

    def read(self, offset, limit):
        return [], offset


class AcmeTrigger(Volume):
    """Like any other."""


class AcmeMethod(ContinualCallback):
    """Remembers nothing."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength
'''

LAUNCHER = '''
"""machines of Acme's

With more words.
"""

def run(settings, command, *, dry_run, wait):
    print("acme runs", settings.nodes, command, dry_run, wait)
    return 7
'''

ENTRY_POINTS = """
[evertune.launchers]
acme = acme_launcher
broken = acme_missing
slurm = acme_launcher

[evertune.sources]
AcmeSource = acme_evertune:AcmeSource
Gone = acme_evertune:Gone

[evertune.triggers]
AcmeTrigger = acme_evertune:AcmeTrigger

[evertune.methods]
AcmeMethod = acme_evertune:AcmeMethod
other_name = acme_evertune:AcmeMethod
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package, installed into a folder."""
    site = tmp_path / "site"
    info = site / "acme_evertune-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-evertune\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "acme_evertune.py").write_text(PACKAGE)
    (site / "acme_launcher.py").write_text(LAUNCHER)
    monkeypatch.syspath_prepend(str(site))
    for name in ("acme_evertune", "acme_launcher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def test_launchers_are_sub_commands(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "--help") == 0
    shown = capsys.readouterr()
    assert "\n  acme        machines of Acme's\n" in shown.out
    assert "\n  slurm       a job of SLURM" in shown.out and "broken" not in shown.out
    assert "the entry point evertune.launchers: broken of acme-evertune cannot be used" in shown.err
    assert "ModuleNotFoundError: No module named 'acme_missing'" in shown.err
    assert run("launch", "acme", "--nodes", "3", "--dry_run", "--", "fit", "--out", "a") == 7
    assert capsys.readouterr().out == "acme runs 3 ['fit', '--out', 'a'] True False\n"


def test_a_broken_launcher_and_an_unknown_one_are_named(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "broken", "--", "fit") == 2
    assert "evertune.launchers: broken of acme-evertune cannot be used" in capsys.readouterr().err
    assert run("launch", "nowhere", "--", "fit") == 2
    assert (
        "WHERE must be one of local, torchrun, slurm, kubernetes, acme, broken, got 'nowhere'"
        in capsys.readouterr().err
    )


def test_a_name_of_evertune_stays_its_own(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "slurm", "--dry_run", "--", "fit") == 0
    assert "#SBATCH" in capsys.readouterr().out


def test_classes_are_named_in_a_configuration(
    installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(installed)
    ours = {
        "source": {"class_path": "AcmeSource", "init_args": {"table": "tickets"}},
        "trigger": {"class_path": "AcmeTrigger"},
        "trainer": {"callbacks": [{"class_path": "AcmeMethod", "init_args": {"strength": 2.0}}]},
    }
    Path("ours.yaml").write_text(yaml.safe_dump(ours))
    assert run("update", "--config", LIVE, "--config", "ours.yaml", "--print_config") == 0
    shown = capsys.readouterr()
    config = yaml.safe_load(shown.out)
    assert config["source"] == {"class_path": "acme_evertune.AcmeSource", "init_args": {"table": "tickets"}}
    assert config["trigger"]["class_path"] == "acme_evertune.AcmeTrigger"
    (method,) = config["trainer"]["callbacks"]
    assert method == {"class_path": "acme_evertune.AcmeMethod", "init_args": {"strength": 2.0}}
    assert "evertune.sources: Gone of acme-evertune cannot be used: AttributeError" in shown.err
    assert (
        "other_name of acme-evertune cannot be used" in shown.err
        and "name the entry point after its class" in shown.err
    )


def test_help_does_not_look_for_entry_points() -> None:
    code = "import sys; from evertune.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'evertune.utils.plugins' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
