"""The files of a registry: whole or not there, on a disk and in a bucket."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile

from evertune.registry.store import RegistryError, Store

BAD_NAMES = ["", "/etc/passwd", "../aliases.json", "versions/../../x", "a//b", "./a", "a/", "a\\b", "a\0b"]


@pytest.fixture(params=["disk", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = tmp_path / "registry" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/registry"
    return Store(root, cache=tmp_path / "cache")


def folder_of(path: Path, **files: bytes) -> Path:
    """A folder with these files (``__`` for /, ``_`` for a dot) and their manifest."""
    hashes = {}
    path.mkdir(parents=True, exist_ok=True)
    for key, content in files.items():
        name = key.replace("__", "/").replace("_", ".")
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"files": hashes}))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files(store: Store) -> None:
    assert store.list() == store.list("slices") == store.leftovers() == []
    assert not store.exists("slices/news [1].jsonl")
    store.write("slices/news [1].jsonl", b"old")
    store.write("slices/news [1].jsonl", b"new")
    store.write("slices/b*.jsonl", b"b")
    store.write("aliases.json", b"{}")
    assert store.list() == ["aliases.json", "slices"]
    assert store.list("slices") == ["b*.jsonl", "news [1].jsonl"]
    assert store.read("slices/news [1].jsonl") == store.local("slices/news [1].jsonl").read_bytes() == b"new"
    assert store.read_all(["slices/b*.jsonl", "slices/c", "aliases.json/x"]) == {"slices/b*.jsonl": b"b"}
    assert store.sizes("slices") == {"b*.jsonl": 1, "news [1].jsonl": 3}
    assert store.sha256("aliases.json") == hashlib.sha256(b"{}").hexdigest()
    store.delete("slices/b*.jsonl")
    store.delete("slices/b*.jsonl")
    assert store.list("slices") == ["news [1].jsonl"]
    store.delete("slices")
    assert store.list() == ["aliases.json"]


def test_a_file_that_is_created_by_one_only(store: Store) -> None:
    store.create("lease/1.json", b"mine")
    with pytest.raises(FileExistsError, match=r"lease/1\.json"):
        store.create("lease/1.json", b"yours")
    assert store.read("lease/1.json") == b"mine"
    assert store.leftovers() == []


def test_what_is_missing_is_named(store: Store) -> None:
    for read in (store.read, store.sha256):
        with pytest.raises(FileNotFoundError, match=f"{store.root}/versions/7/manifest.json"):
            read("versions/7/manifest.json")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_outside_are_refused(store: Store, name: str, tmp_path: Path) -> None:
    actions = [store.read, store.delete, store.exists, store.local, store.sizes, lambda name: store.write(name, b"")]
    for action in [*actions, lambda name: store.publish(folder_of(tmp_path / "new"), name)]:
        with pytest.raises(ValueError, match="names in a registry are relative"):
            action(name)


def test_publish(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "staging", model__weights_bin=b"abc", learning__Replay__memory_json=b"{}")
    expected = contents(folder)
    store.publish(folder, "versions/1")
    assert not folder.exists()
    assert store.list("versions") == ["1"]
    assert contents(store.local("versions/1")) == expected
    again = folder_of(tmp_path / "again", other_bin=b"x")
    with pytest.raises(FileExistsError, match="versions/1"):
        store.publish(again, "versions/1")
    assert contents(store.local("versions/1")) == expected
    assert (again / "other.bin").exists()
    store.delete("versions/1")
    assert store.list("versions") == store.leftovers() == []
    store.publish(again, "versions/1")
    assert (store.local("versions/1") / "other.bin").read_bytes() == b"x"


# --- a disk


def test_addresses_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("registry", f"file://{tmp_path}/registry", f"local://{tmp_path}/registry", tmp_path / "registry"):
        store = Store(address)
        assert store.is_local
        assert store.root == str(tmp_path / "registry")
        assert store.local("staging") == tmp_path / "registry/staging"
    assert not (tmp_path / "registry").exists()  # looking makes nothing


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    store = Store(tmp_path / "mnt/disk/registry")
    assert store.list("versions") == []
    actions = [
        lambda: store.write("aliases.json", b"{}"),
        lambda: store.create("a", b""),
        lambda: store.publish(folder_of(tmp_path / "new"), "versions/1"),
        lambda: store.locked().__enter__(),
    ]
    for action in actions:
        with pytest.raises(
            FileNotFoundError, match=r"the folder .*mnt/disk does not exist: mount its disk, or create it"
        ):
            action()
    assert not (tmp_path / "mnt").exists()


def test_what_a_killed_process_leaves_is_not_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("versions/1/manifest.json", b"{}")
    (tmp_path / ".aliases.json.0a1b2c3d.tmp").write_bytes(b"{")
    (tmp_path / "versions/.2.0a1b2c3d.tmp").mkdir()
    (tmp_path / "versions/.2.0a1b2c3d.tmp/model").write_bytes(b"half")
    assert store.list() == ["versions"]
    assert store.list("versions") == ["1"]
    assert store.leftovers() == [".aliases.json.0a1b2c3d.tmp", "versions/.2.0a1b2c3d.tmp"]
    os.utime(tmp_path / ".aliases.json.0a1b2c3d.tmp", (0, 0))
    assert store.age(".aliases.json.0a1b2c3d.tmp") > 1e9
    assert store.age("versions/.2.0a1b2c3d.tmp") < 3600
    for name in store.leftovers():
        store.delete(name)
    assert store.leftovers() == []
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_lock_that_is_not_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.registry.store._PATIENCE", 0.02)
    held = pytest.raises(RegistryError, match=r"another process has held .*\.lock for")
    with Store(tmp_path).locked(), held, Store(tmp_path).locked():
        raise AssertionError
    with Store(tmp_path).locked():
        assert Store(tmp_path).list() == []


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    """A small disk of its own; skips where it cannot be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "256k"):
        store = Store(tmp_path / "disk/registry")
        store.write("aliases.json", b"old")
        with pytest.raises(
            OSError, match=r"the disk is full; free some space and run again: .*/aliases\.json"
        ) as caught:
            store.write("aliases.json", b"n" * 500_000)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="the disk is full"):
            store.create("lease/1.json", b"n" * 500_000)
        folder = folder_of(tmp_path / "staging", model_bin=b"m" * 500_000)
        with pytest.raises(OSError, match="the disk is full"):
            store.publish(folder, "versions/1")  # from another disk: copied
        assert store.read("aliases.json") == b"old"
        assert store.list("lease") == store.list("versions") == store.leftovers() == []
        assert (folder / "model.bin").stat().st_size == 500_000
        small = folder_of(tmp_path / "small", model_bin=b"m")
        store.publish(small, "versions/1")
        assert not small.exists()
        assert store.sizes("versions/1").keys() == {"model.bin", "manifest.json"}


def test_a_read_only_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "256k"):
        store = Store(tmp_path / "disk/registry")
        store.publish(folder_of(tmp_path / "disk/one", model_bin=b"m"), "versions/1")
        store.write("aliases.json", b"old")
        folder_of(tmp_path / "disk/two", model_bin=b"m")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        actions = [
            lambda: store.write("aliases.json", b"new"),
            lambda: store.create("lease", b"new"),
            lambda: store.delete("versions/1"),
            lambda: store.delete("aliases.json"),
            lambda: store.publish(tmp_path / "disk/two", "versions/2"),
            lambda: store.locked().__enter__(),
        ]
        for action in actions:
            with pytest.raises(
                OSError, match=r"the file system is read-only; mount it writable and run again: '.*disk"
            ):
                action()
        assert store.read("aliases.json") == b"old"
        assert store.list("versions") == ["1"]
        assert (store.local("versions/1") / "model.bin").read_bytes() == b"m"


# --- a bucket


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    return Store(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")


def test_urls_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        Store("nonesuch://bucket/registry")
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket needs another package: .*gcsfs"):
        Store("gs://bucket")


def test_a_copy_of_a_bucket_is_checked_and_made_again(bucket: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "new", model__weights_bin=b"abc", model__config_json=b"{}")
    expected = contents(folder)
    bucket.publish(folder, "versions/1")
    copy = bucket.local("versions/1")
    assert copy.is_relative_to(tmp_path / "cache")
    (copy / "model/weights.bin").write_bytes(b"xyz")
    other = Store(bucket.root, cache=tmp_path / "cache")  # another process, later
    assert other.local("versions/1") == copy
    assert contents(copy) == expected
    (copy / "manifest.json").unlink()
    assert contents(Store(bucket.root, cache=tmp_path / "cache").local("versions/1")) == expected


def test_a_bucket_that_is_damaged_itself(bucket: Store, tmp_path: Path) -> None:
    bucket.publish(folder_of(tmp_path / "new", weights_bin=b"abc"), "versions/1")
    bucket.write("versions/1/weights.bin", b"ab")
    with pytest.raises(RegistryError, match=r"versions/1 is damaged or was changed while it was read"):
        bucket.local("versions/1")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


OUTSIDE = ["../planted", "../../../../planted", "model/../../planted", "/planted", "{tmp}/planted", "C:planted", "a\\b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_bucket_writes_nothing_outside_the_cache(bucket: Store, tmp_path: Path, name: str) -> None:
    name = name.format(tmp=tmp_path)
    bucket.publish(folder_of(tmp_path / "new", weights_bin=b"abc"), "versions/1")
    manifest = bucket.read("versions/1/manifest.json")
    key = f"{bucket._files._of('versions/1')}/{name}"  # type: ignore[union-attr]
    files = bucket._files._fs  # type: ignore[union-attr]
    files.store[key] = MemoryFile(files, key, b"planted")  # object stores take any key as it is
    before = set(tmp_path.rglob("*"))
    copy = bucket.local("versions/1")
    assert contents(copy).keys() == {"weights.bin", "manifest.json"}
    planted = json.loads(manifest)
    planted["files"][name] = hashlib.sha256(b"planted").hexdigest()
    bucket.write("versions/1/manifest.json", json.dumps(planted).encode())
    with pytest.raises(RegistryError, match=r"manifest.json is damaged: names in a registry are relative"):
        bucket.local("versions/1")
    written = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    assert all(path.is_relative_to(copy) for path in written)


def test_half_a_folder_in_a_bucket_is_not_there(bucket: Store, tmp_path: Path) -> None:
    bucket.write("versions/1/model/old.bin", b"of a process that was killed")
    with pytest.raises(FileNotFoundError, match=r"versions/1"):
        bucket.local("versions/1")
    bucket.publish(folder_of(tmp_path / "new", model__new_bin=b"abc"), "versions/1")
    assert bucket.sizes("versions/1").keys() == {"manifest.json", "model/new.bin"}


def test_copies_go_with_what_they_copy(bucket: Store, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        bucket.publish(folder_of(tmp_path / "new", model_bin=b"%d" % number), f"versions/{number}")
    copies = [bucket.local(f"versions/{number}") for number in (1, 2)]
    Store(bucket.root, cache=tmp_path / "elsewhere").delete("versions/1")  # by gc on another machine
    bucket.local("versions/3")
    assert [copy.exists() for copy in copies] == [False, True]
    bucket.delete("versions/2")
    assert not copies[1].exists()


def test_errors_of_a_bucket_are_named(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class EndpointError(Exception):
        """Of a library that knows no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise EndpointError("no route")

    monkeypatch.setattr(bucket._files._fs, "cat_file", fail)  # type: ignore[union-attr]
    with pytest.raises(OSError, match=f"cannot read: EndpointError: no route: '{bucket.root}/aliases.json'"):
        bucket.read("aliases.json")
