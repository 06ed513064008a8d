"""The files of a registry, in a local folder or a bucket, written so that nothing is ever half there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from evertune.utils.files import sha256, sync_folder, sync_tree, write_atomically
from evertune.utils.typed_json import read_json

MANIFEST = "manifest.json"
"""The file of a published folder that lists its other files. It is written last and deleted first."""

_THREADS = 8
_PATIENCE = 10.0
_T = TypeVar("_T")
Names = list[str]
_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EROFS: "the file system is read-only; mount it writable and run again",
    errno.EACCES: "permission denied; give this user the right to it and run again",
    errno.EPERM: "not permitted; give this user the right to it and run again",
    errno.EIO: "the disk or its network mount fails; see to it and run again",
    errno.ESTALE: "the network mount is gone; mount it again and run again",
    errno.ENOTCONN: "the network mount is gone; mount it again and run again",
}


@dataclass
class _Files:
    """The part of a manifest that says which files its folder has."""

    files: dict[str, str]


class RegistryError(RuntimeError):
    """The registry is damaged, or refuses a request; the message says what to do."""


class Store:
    """Files under one root. Readers see an old file or a new one, a whole folder or none.

    Names are relative, with ``/`` between their parts: ``"versions/7/manifest.json"``. Names that start with a dot are
    internal and not listed: a killed process leaves half-written files only under such names.

    A local root is created if it is missing, but its parent folder is not: if a disk is not mounted, an error is better
    than a new, empty registry. A remote root is a bucket of an object store (``s3://``, ``gs://``, ...), in which
    writes of single files are atomic; credentials and endpoints come from the environment or fsspec's configuration
    files.

    Args:
        root: A local folder, or any URL that fsspec supports.
        cache: Local folder in which :meth:`local` keeps copies of remote files. Default: ``$EVERTUNE_CACHE``, else
            ``evertune`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ValueError: If fsspec does not support the kind of URL.
        ModuleNotFoundError: If a package that the URL requires is not installed.

    Example:
        >>> store = Store("memory://doc/registry")
        >>> store.write("slices/news.jsonl", b"{}")
        >>> store.list("slices"), store.read("slices/news.jsonl")
        (['news.jsonl'], b'{}')
    """

    def __init__(self, root: str | Path, cache: str | Path | None = None) -> None:
        address = str(root)
        for scheme in ("file://", "local://"):
            address = address.removeprefix(scheme)
        self.is_local = "://" not in address
        self._files: _Folder | _Bucket
        if self.is_local:
            self._files = _Folder(Path(address).expanduser().absolute())
        else:
            self._files = _Bucket(address, Path(cache) if cache is not None else cache_folder())
        self.root = self._files.root

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def address(self, name: str) -> str:
        """The full path or URL of a file, for messages."""
        return f"{self.root.rstrip('/')}/{_checked(name)}"

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        with _explained("read", self.address(name)):
            return self._files.read(name)

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """The contents of many files by name, leaving out those that do not exist; several at a time from a bucket."""

        def read(name: str) -> bytes | None:
            with suppress(FileNotFoundError, NotADirectoryError):
                return self.read(name)
            return None

        found = self._files.each(read, list(names))
        return {name: content for name, content in found.items() if content is not None}

    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing an old one. It is complete on disk when this returns, or unchanged if this fails.

        Raises:
            OSError: If it cannot be written.
        """
        with _explained("write", self.address(name)):
            self._files.write(name, data)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet: if several processes try, one succeeds.

        Raises:
            FileExistsError: If it exists.
        """
        with _explained("write", self.address(name)):
            self._files.create(name, data)

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        with _explained("read", self.address(name)):
            return self._files.exists(name)

    def list(self, folder: str = "") -> Names:
        """The names of the files and folders in a folder, sorted, without those that start with a dot.

        Empty if there is no such folder.
        """
        with _explained("list", self.address(folder) if folder else self.root):
            return sorted(name for name in self._files.list(folder) if not name.startswith(".") and _is_name(name))

    def sizes(self, folder: str) -> dict[str, int]:
        """The size in bytes of every file in a folder and its subfolders, by its name relative to the folder.

        For a file, its own size.
        """
        with _explained("list", self.address(folder)):
            return dict(sorted(self._files.sizes(folder).items()))

    def sha256(self, name: str) -> str:
        """The SHA-256, in hexadecimal, of a file as the store holds it now.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        with _explained("read", self.address(name)):
            return self._files.sha256(name)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder, which disappears as a whole. A missing one is not an error."""
        with _explained("delete", self.address(name)):
            self._files.delete(name)

    def local(self, name: str) -> Path:
        """The local path of a file or a published folder, for reading.

        For a local store, this is the path itself, whether or not it exists. For a bucket, it is a copy in the cache: a
        folder consists of the ``files`` (SHA-256 by name) of its ``manifest.json``, which are checked when they are
        downloaded and once in every process, and downloaded again if one is damaged. Copies of folders that the bucket
        no longer holds are deleted.

        Raises:
            FileNotFoundError: If it does not exist, or is a folder of a bucket without ``manifest.json``.
            RegistryError: If the bucket's own files are damaged.
        """
        with _explained("read", self.address(name)):
            return self._files.local(name)

    def publish(self, folder: Path, name: str) -> None:
        """Make a local folder appear under ``name``, as a whole or not at all; ``folder`` itself is gone afterwards.

        In a local store, it is moved once all its files are on disk. To a bucket, its files are copied,
        ``manifest.json`` last: without it, the folder does not exist for :meth:`local`.

        Raises:
            FileExistsError: If there is such a folder.
            OSError: If it cannot be written; ``folder`` is unchanged.
        """
        with _explained("write", self.address(name)):
            self._files.publish(folder, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes for the few milliseconds of reading, comparing and writing.

        Uses ``flock``, which the system releases when the process ends. Has no effect in a bucket, or if the file
        system does not support locks.

        Raises:
            RegistryError: If another process does not release the lock within ten seconds.
        """
        with self._files.locked():
            yield

    def age(self, name: str) -> float:
        """Seconds since the newest change of a file or folder; 0 in a bucket, where only complete files are written."""
        with _explained("read", self.address(name)):
            return self._files.age(name)

    def leftovers(self) -> Names:
        """Files that killed processes have left half-written or half-deleted, in the root and its direct subfolders."""
        with _explained("list", self.root):
            return sorted(self._files.leftovers())


class _Folder:
    """A store in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = str(path)

    def each(self, act: Callable[[str], _T], names: Sequence[str]) -> dict[str, _T]:
        return {name: act(name) for name in names}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        self._make((self.path / name).parent)
        write_atomically(self.path / name, data)

    def create(self, name: str, data: bytes) -> None:
        target = self.path / name
        self._make(target.parent)
        draft = target.with_name(_temporary_name(target.name))
        try:
            write_atomically(draft, data)
            # A hard link fails if the target exists and appears with its whole content, which open("x") does not
            # guarantee.
            os.link(draft, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            with target.open("xb") as file:  # the file system does not support hard links
                file.write(data)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(target.parent)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def list(self, folder: str) -> Names:
        try:
            return [path.name for path in (self.path / folder).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        if (self.path / folder).is_file():
            return {folder: (self.path / folder).stat().st_size}
        return {
            path.relative_to(self.path / folder).as_posix(): path.stat().st_size
            for path in (self.path / folder).rglob("*")
            if path.is_file()
        }

    def sha256(self, name: str) -> str:
        return sha256(self.path / name)

    def delete(self, name: str) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            # Renamed first, which is atomic: a crash during rmtree leaves a hidden leftover and not half a version.
            gone = path if _is_temporary(path.name) else path.with_name(_temporary_name(path.name))
            path.rename(gone)
            sync_folder(path.parent)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        return self.path / name

    def publish(self, folder: Path, name: str) -> None:
        target = self.path / name
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self._make(target.parent)
        # Data before the rename: otherwise a power failure could leave the new name with empty files.
        sync_tree(folder)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            # EXDEV: the folder is on another file system, to which rename() cannot move it.
            if error.errno != errno.EXDEV:
                raise
            self._move_across(folder, target)
        sync_folder(target.parent)

    def _move_across(self, folder: Path, target: Path) -> None:
        """Move a folder from another file system: copy it under a hidden name, then rename the copy."""
        temporary = target.with_name(_temporary_name(target.name))
        try:
            for path in (folder, *sorted(folder.rglob("*"))):
                copy = temporary / path.relative_to(folder)
                if path.is_dir():
                    copy.mkdir()
                else:
                    shutil.copyfile(path, copy)
            sync_tree(temporary)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
        shutil.rmtree(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        self._make(self.path)
        address = str(self.path / ".lock")
        with _explained("write", address):
            handle = os.open(address, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RegistryError(
                            f"another process has held {address} for {_PATIENCE:.0f} s, so it is stopped or hangs: "
                            "end it and run again"
                        ) from None
                    time.sleep(0.005)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    break
            yield
        finally:
            os.close(handle)

    def age(self, name: str) -> float:
        path = self.path / name
        times = [entry.lstat().st_mtime for entry in (path, *path.rglob("*"))]
        return time.time() - max(times)

    def leftovers(self) -> Names:
        found = (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp"))
        return [path.relative_to(self.path).as_posix() for path in found]

    def _make(self, folder: Path) -> None:
        """Create a folder of the store and its parents, from the root down, each synced to disk."""
        if folder.is_dir():
            return
        if folder != self.path:
            self._make(folder.parent)
        elif not folder.parent.is_dir():
            raise FileNotFoundError(
                errno.ENOENT,
                f"the folder {folder.parent} does not exist: mount its disk, or create it",
                self.root,
            )
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


class _Bucket:
    """A store behind a URL. Every call names a single file, so that no name is interpreted as a pattern."""

    def __init__(self, url: str, cache: Path) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.root = url.rstrip("/")
        scheme = self.root.partition("://")[0]
        try:
            self._fs, self._path = url_to_fs(self.root, use_listings_cache=False)
        except ImportError as error:
            what = 'pip install "evertune[s3]"' if scheme in ("s3", "s3a") else str(error)
            raise ModuleNotFoundError(f"{self.root} needs another package: {what}") from error
        self._cache = cache / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self._checked: dict[str, bytes] = {}

    def each(self, act: Callable[[str], _T], names: Sequence[str]) -> dict[str, _T]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(act, names), strict=True))

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self._of(name)))

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._of(name), data)

    def create(self, name: str, data: bytes) -> None:
        if self.exists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        try:
            self._fs.pipe_file(self._of(name), data, mode="create")
        except (NotImplementedError, ValueError, TypeError):  # not supported here: the last writer wins
            self.write(name, data)
        # Without a conditional write another process may have overwritten ours: reading it back shows who has won.
        if self.read(name) != data:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._of(name)))

    def list(self, folder: str) -> Names:
        path = self._of(folder) if folder else self._path
        try:
            found = self._fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(entry).rstrip("/").removeprefix(path.rstrip("/") + "/") for entry in found)
        return [name for name in names if name and "/" not in name]

    def sizes(self, folder: str) -> dict[str, int]:
        path = self._of(folder)
        if self._fs.isfile(path):
            return {folder: int(self._fs.info(path)["size"])}
        found = self._fs.find(path, detail=True)
        return {str(name).removeprefix(path + "/"): int(about["size"]) for name, about in found.items()}

    def sha256(self, name: str) -> str:
        with self._fs.open(self._of(name), "rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def delete(self, name: str) -> None:
        path = self._of(name)
        if self._fs.isfile(path):
            self._fs.rm_file(path)
        else:
            inside = self.sizes(name)
            # The manifest first: without it, the folder counts as gone, however many of its files are left.
            if MANIFEST in inside:
                self._fs.rm_file(f"{path}/{MANIFEST}")
                del inside[MANIFEST]
            self.each(lambda file: self._fs.rm_file(f"{path}/{file}"), list(inside))
            folders = {parent for file in inside for parent in PurePosixPath(path, file).parents}
            for folder in sorted(map(str, folders), key=len, reverse=True):  # some stores keep empty folders
                if folder.startswith(path):
                    with suppress(OSError):
                        self._fs.rmdir(folder)
        _remove(self._cache / name)

    def local(self, name: str) -> Path:
        path = self._cache / name
        if self._fs.isfile(self._of(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(_temporary_name(path.name))
            try:
                self._fs.get_file(self._of(name), str(temporary))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            return path
        manifest = self.read(f"{name}/{MANIFEST}")
        if self._checked.get(name) != manifest:
            if not _holds(path, manifest):
                self._download(name, manifest)
            self._checked[name] = manifest
        return path

    def _download(self, name: str, manifest: bytes) -> None:
        path = self._cache / name
        temporary = path.with_name(_temporary_name(path.name))
        try:
            # Named by the manifest and not by the bucket, whose keys may contain "..": nothing is written elsewhere.
            try:
                files = list(_files_of(manifest))
            except ValueError as error:
                raise RegistryError(f"{self.root}/{name}/{MANIFEST} is damaged: {error}") from None
            for file in (*files, MANIFEST):
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # reported below
                self.each(lambda file: self._fs.get_file(f"{self._of(name)}/{file}", str(temporary / file)), files)
            (temporary / MANIFEST).write_bytes(manifest)
            if not _holds(temporary, manifest):
                raise RegistryError(
                    f"{self.root}/{name} is damaged or was changed while it was read: see `evertune registry verify`"
                )
            _remove(path)
            with suppress(OSError):  # another process was faster, with the same files
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        parent = name.rpartition("/")[0]
        # Deletes cached versions that the bucket no longer holds, or the cache would grow without limit.
        kept = set(self.list(parent))
        for other in path.parent.iterdir():
            if other.name not in kept and not _is_temporary(other.name):
                _remove(other)

    def publish(self, folder: Path, name: str) -> None:
        if self.exists(f"{name}/{MANIFEST}"):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.delete(name)  # leftovers of a killed process
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        first = [file for file in files if file != MANIFEST]
        self.each(lambda file: self._fs.put_file(str(folder / file), f"{self._of(name)}/{file}"), first)
        if MANIFEST in files:
            self.write(f"{name}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        shutil.rmtree(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def age(self, name: str) -> float:
        return 0.0

    def leftovers(self) -> Names:
        return []

    def _of(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


def _checked(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name or name[1:2] == ":":
        raise ValueError(f"names in a registry are relative, with / between parts and without . and .., got {name!r}")
    return name


def _is_name(name: str) -> bool:
    try:
        return bool(_checked(name))
    except ValueError:
        return False


def cache_folder() -> Path:
    """Where copies of remote files and exports are kept: ``$EVERTUNE_CACHE``, or a folder of the user's cache."""
    named = os.environ.get("EVERTUNE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "evertune"


def _temporary_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(4)}.tmp"


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _holds(folder: Path, manifest: bytes) -> bool:
    """Whether a folder contains this manifest and all files that it names, undamaged."""
    try:
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        return all(sha256(folder / name) == digest for name, digest in _files_of(manifest).items())
    except (OSError, ValueError):
        return False


def _files_of(manifest: bytes) -> dict[str, str]:
    """The files that a manifest lists, with their SHA-256, each inside its folder.

    Raises:
        ValueError: If the manifest is damaged, or names a file elsewhere.
    """
    files = read_json(_Files, manifest).files
    for name in files:
        if _checked(name) == MANIFEST:
            raise ValueError(f"it lists {MANIFEST} itself")
    return files


def _remove(path: Path) -> None:
    """Delete a file or folder of the cache. A folder is renamed first, so that nobody mistakes half of it for whole."""
    with suppress(OSError):
        if path.is_dir():
            path = path.rename(path.with_name(_temporary_name(path.name)))
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _explained(action: str, address: str) -> Iterator[None]:
    """Make errors name the file, and what to do."""
    try:
        yield
    except OSError as error:
        known = _ADVICE.get(error.errno or 0)
        text = f"cannot {action}: {known}" if known else error.strerror or str(error) or type(error).__name__
        number = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO)
        raise OSError(number, text, address) from error
    except (RegistryError, ValueError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:  # raised by the library of the object store
        raise OSError(errno.EIO, f"cannot {action}: {type(error).__name__}: {error}", address) from error
