"""Two versions of a registry on the same records: the test, the classes, the flips, the command and its page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.cli.main import main
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.compare import compare_versions
from evertune.live.slices import save_slice
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import tiny_bert

CLASSES = ["business", "sport"]
ROWS = [{"text": f"the bank share {n}", "label": "business"} for n in range(20)]
ROWS += [{"text": f"the <b>goal</b> {n}", "label": "sport"} for n in range(5)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Version 1 answers "business" to everything, version 2 "sport", version 3 as version 1."""
    folder = tmp_path_factory.mktemp("compare")
    backbone, registry = tiny_bert(folder / "bert"), Registry(folder / "registry")
    for number, favourite in enumerate([0, 1, 0], 1):
        module = SequenceClassificationModule(backbone, classes=CLASSES)
        module.configure_model()
        with torch.no_grad():
            head = list(module.modules())[-1]
            assert isinstance(head, torch.nn.Linear)
            head.weight.zero_()
            head.bias.copy_(2.0 * torch.eye(2)[favourite])
        staging = folder / "staging"
        module.save_pretrained(staging / "model")
        held_out = [{"id": f"h{n}", "record": row} for n, row in enumerate(ROWS[-8:])]
        entry = save_slice(registry.store, "first", held_out)
        manifest = Manifest(
            version=number,
            parent=number - 1 or None,
            module="SequenceClassificationModule",
            config={"schema": {"text": "text", "label": "label"}, "data": {"max_length": 16}},
        )
        registry.publish(staging, manifest, [entry])
    registry.promote(1)
    return registry


def test_worse_version_is_found_with_its_classes_and_records(registry: Registry) -> None:
    found = compare_versions(registry, 1, 2, ROWS)
    assert found.scores == (0.8, 0.2) and found.records == 25
    assert (
        found.is_worse
        and not found.is_better
        and found.p_worse == pytest.approx(sum(math.comb(25, k) for k in range(20, 26)) / 2**25)
    )
    assert [(one.name, one.records, one.found) for one in found.classes] == [
        ("business", 20, (1.0, 0.0)),
        ("sport", 5, (0.0, 1.0)),
    ]
    assert found.classes[0].right[0] == 0.8 and math.isnan(found.classes[0].right[1])
    assert [(one.label, one.answer, one.records) for one in found.confusions] == [
        ("business", "sport", (0, 20)),
        ("sport", "business", (5, 0)),
    ]
    assert len(found.worse) == 20 and len(found.better) == 5
    first = found.worse[0]
    assert (first.id, first.text, first.label, first.answers) == (
        "1",
        "the bank share 0",
        "business",
        ("business", "sport"),
    )
    assert first.confidence == pytest.approx((0.880797, 0.880797))
    assert found.headline.startswith("version 2 is worse than version 1 by 60.0 points")


def test_better_version_and_equal_ones(registry: Registry) -> None:
    better = compare_versions(registry, 2, 3, ROWS)
    assert better.is_better and not better.is_worse and "better" in better.headline
    same = compare_versions(registry, 1, 3, ROWS)
    assert not same.is_worse and not same.is_better and same.p_worse == same.p_better == 1
    assert not same.worse and not same.better and not any(a != b for one in same.confusions for a, b in [one.records])


def test_held_out_records_are_the_default(registry: Registry) -> None:
    found = compare_versions(registry, 1, 2)
    assert found.records == 8 and found.scores == (0.375, 0.625) and found.worse[0].id == "h0"


def test_bad_records_are_counted(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": "no label"}, {"text": 3, "label": "sport"}])
    )
    with pytest.warns(UserWarning, match="skipped 2 bad rows"):
        found = compare_versions(registry, 1, 2, path)
    assert found.records == 25 and found.bad == 2 and "label" in found.first_bad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"a": 1, "b": "production"}, "1 and production are both version 1"),
        ({"alpha": 1.0}, "alpha must be between 0 and 1, got 1.0"),
        ({"max_length": 10_000}, "max_length must be at most"),
    ],
)
def test_refused(registry: Registry, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare_versions(registry, **{"a": 1, "b": 2, "data": ROWS, **settings})


def test_command(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"body": row["text"], "topic": row["label"]}) + "\n" for row in ROWS))
    where = ["--data", str(data), "--text", "body", "--label", "topic"]
    out = ["--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit) as left:
        main(["compare", registry.store.root, "1", "2", *where, *out])
    assert left.value.code == 1
    printed = capsys.readouterr().out
    assert "version 2 is worse" in printed and "the bank share 0" in printed and "version 1 80.0 %" in printed
    page = (tmp_path / "page.html").read_text()
    assert "the &lt;b&gt;goal&lt;/b&gt; 0" in page and "<b>goal" not in page and "business (88 %)" in page
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["is_worse"] is True and found["scores"] == [0.8, 0.2] and found["classes"][0]["right"] == [0.8, None]
    with pytest.raises(SystemExit) as left:
        main(["compare", registry.store.root, "2", "1", *where])
    assert left.value.code == 0


@pytest.mark.parametrize(
    "arguments", [["1", "9"], ["1", "1"], ["1", "2", "--data", "nowhere.jsonl"], ["1", "2", "--module_class", "x"]]
)
def test_command_refuses_by_name(registry: Registry, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", registry.store.root, *arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("evertune compare: ") and "Traceback" not in error
