"""Atomic and durable writes, deletions that leave nothing behind, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in chunks regardless of its size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: Any) -> None:
    """Write a file atomically: a reader, also after a power failure, sees the old content or the new, never a part.

    Args:
        path: File to write; its folder must exist.
        data: Bytes, or any object with a buffer of bytes.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def delete(path: Path) -> None:
    """Delete a file, a folder with everything in it, or a link but not what it leads to; a missing one is not an error.

    Raises:
        OSError: If it is not deleted. Nothing is ignored, since what stays would be taken for something else later.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def empty(folder: Path) -> None:
    """Delete everything in a folder, and the folder itself unless it is a link to one; a missing one is not an error.

    Raises:
        OSError: If something is not deleted.
    """
    if not folder.is_symlink():
        delete(folder)
        return
    for path in list(folder.iterdir()):
        delete(path)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable, if the file system supports it: some network mounts do not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and everything in it durable."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
