"""The index of slices: each slice once, whole lists by a digest, and what damage leaves of them."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest

from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.slice_index import INDEX, SliceEntry, SliceIndex
from evertune.registry.store import Store


def entry(number: int) -> SliceEntry:
    return SliceEntry(f"update-{number}", f"slices/update-{number}-0000.jsonl", 20, f"{number:064x}")


def save(store: Store, number: int) -> SliceEntry:
    file = f"slices/update-{number}-0000.jsonl"
    store.write(file, b'{"id": "%d"}\n' % number)
    return SliceEntry(f"update-{number}", file, 1, store.sha256(file))


def publish(registry: Registry, slices: list[SliceEntry]) -> None:
    folder = Path(tempfile.mkdtemp(dir=Path(registry.store.root).parent if registry.store.is_local else None))
    (folder / "weights").write_bytes(b"weights")
    number = registry.next_number()
    registry.publish(folder, Manifest(version=number, parent=number - 1 or None), slices)


@pytest.fixture(params=["disk", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """Five versions, of which the fourth was refused: the fifth goes on from the third."""
    root = tmp_path / "registry" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/registry"
    registry = Registry(root, cache=tmp_path / "cache")
    slices: list[SliceEntry] = []
    for number in range(1, 6):
        new = [*slices, save(registry.store, number)]
        publish(registry, new)
        slices = slices if number == 4 else new
    return registry


def names(registry: Registry, number: int) -> list[str]:
    return [entry.name for entry in registry.version(number).slices()]


def test_lists_share_what_they_begin_with() -> None:
    index = SliceIndex()
    trunk = [entry(number) for number in range(1, 4)]
    first, one, two = index.add(trunk), index.add([*trunk, entry(4)]), index.add([*trunk, entry(5)])
    assert len(index.content.splitlines()) == 5
    assert index.add(trunk) == first
    again = SliceIndex(index.content)
    assert again.entries(first) == trunk
    assert (again.entries(one), again.entries(two)) == ([*trunk, entry(4)], [*trunk, entry(5)])
    assert (again.add([]), again.entries(None), list(again.problems())) == (None, [], [])


def test_every_version_has_its_list(registry: Registry) -> None:
    assert names(registry, 4) == ["update-1", "update-2", "update-3", "update-4"]
    assert names(registry, 5) == ["update-1", "update-2", "update-3", "update-5"]
    assert len(registry.store.read(INDEX).splitlines()) == 5
    assert registry.verify() == registry.repair() == []
    registry.promote(5, verify=False)
    assert "slices/update-4-0000.jsonl" in registry.gc(keep=1)
    assert names(registry, 5) == ["update-1", "update-2", "update-3", "update-5"]
    assert registry.verify() == []


def test_a_registry_grows_by_the_same_for_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    registry = Registry(tmp_path / "registry")
    slices: list[SliceEntry] = []
    sizes = []
    for number in range(1, 201):
        slices.append(entry(number))
        publish(registry, slices)
        sizes.append(sum(registry.store.sizes(f"versions/{number}").values()))
    assert max(sizes) - min(sizes) < 70  # the digest, which the first has too, and digits
    assert max(sizes) < 1_000
    assert sum(registry.store.sizes(INDEX).values()) < 200 * 300
    assert Registry(registry.store.root).version(200).slices() == slices


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("change", ["flip", "delete"])
def test_a_damaged_line_stops_no_serving_and_is_restored(registry: Registry, line: int, change: str) -> None:
    whole = registry.store.read(INDEX)
    lines = whole.splitlines(keepends=True)
    lines[line : line + 1] = [] if change == "delete" else [lines[line].replace(b"update", b"updbte")]
    registry.store.write(INDEX, b"".join(lines))
    findings = registry.inspect()
    assert findings
    assert all(finding.usable and registry.store.address(INDEX) in finding.words for finding in findings)
    harmed = {finding.version for finding in findings if finding.version}
    assert harmed == [{1, 2, 3, 4, 5}, {2, 3, 4, 5}, {3, 4, 5}, {4}, {5}][line]
    with pytest.raises(RegistryError, match=r"index\.jsonl is damaged \(it lacks the list of slices"):
        registry.version(min(harmed)).slices()
    assert registry.promote(5).number == 5
    assert registry.repair() == [f"{INDEX} is set aside and written again; no versions lack their list of slices"]
    assert registry.verify() == registry.repair() == []
    assert names(registry, 5) == ["update-1", "update-2", "update-3", "update-5"]
    assert len(registry.store.list("damaged")) == 1


def test_an_index_that_is_cut_short_is_restored(registry: Registry) -> None:
    whole = registry.store.read(INDEX)
    for length in (len(whole) - 1, len(whole) - 100, len(whole) // 2, 10, 0):
        registry.store.write(INDEX, whole[:length])
        assert any(registry.store.address(INDEX) in words for words in registry.verify())
        assert len(registry.repair()) == 1
        assert registry.verify() == []
        assert names(registry, 4) == ["update-1", "update-2", "update-3", "update-4"]


def test_what_cannot_be_restored_is_said(registry: Registry) -> None:
    whole = registry.store.read(INDEX)
    registry.promote(5, verify=False)
    registry.gc(keep=1)
    registry.store.write(INDEX, b"")
    with pytest.raises(RegistryError, match="a backup the rest"):
        registry.gc(keep=1)
    registry.repair()
    assert any("a backup the rest" in words for words in registry.verify())
    registry.store.write(INDEX, whole)
    assert registry.verify() == []


def test_a_publication_goes_on_from_a_damaged_index(registry: Registry) -> None:
    """The list that is published is written as a whole where it is not there."""
    slices = registry.version(5).slices()
    registry.store.write(INDEX, registry.store.read(INDEX)[:300])
    publish(registry, [*slices, save(registry.store, 6)])
    assert names(registry, 5) == ["update-1", "update-2", "update-3", "update-5"]
    assert names(registry, 6)[-1] == "update-6"


def test_killed_before_the_manifest(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    slices = [*registry.version(5).slices(), save(registry.store, 6)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry.store, "publish", dies)
        publish(registry, slices)
    assert len(registry.store.read(INDEX).splitlines()) == 6
    assert (registry.verify(), registry.next_number()) == ([], 6)
    publish(registry, slices)
    assert len(registry.store.read(INDEX).splitlines()) == 6
    assert registry.version(6).slices() == slices
