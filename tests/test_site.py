"""The documentation site: it builds without a warning, so every link, anchor and reference leads somewhere."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evertune

ROOT = Path(__file__).resolve().parent.parent
NOT_PUBLIC = {"cli", "utils"}


def test_the_reference_has_every_package() -> None:
    listed = re.findall(r"^   evertune\.(\w+)$", (ROOT / "docs/reference.rst").read_text(), flags=re.MULTILINE)
    public = {module.name for module in pkgutil.iter_modules(evertune.__path__) if not module.name.startswith("_")}
    assert listed == sorted(public - NOT_PUBLIC)


def test_every_page_has_its_place_in_the_index() -> None:
    placed = re.findall(r"^(\w+)$", (ROOT / "docs/index.md").read_text(), flags=re.MULTILINE)
    pages = [path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst")]
    assert sorted([*placed, "index"]) == sorted(pages)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason=f"no {name} (pip install {name.replace('_', '-')})")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "reference"))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", source / "docs", source, site]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8_000:]
    assert "EWC" in (site / "docs/reference/evertune.callbacks.html").read_text()
    assert "docs/index.html" in (site / "index.html").read_text()
