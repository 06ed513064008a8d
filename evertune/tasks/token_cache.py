"""Tokens kept on disk, under a hash of everything that they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Arrays: TypeAlias = Mapping[str, np.ndarray]
_STATE_OF_CALLS = ("truncation", "padding")  # what the last call to the tokenizer left in it


class TokenCache:
    """A folder of tokenised texts. The same texts are tokenised once, by one of the processes that share the folder.

    Tokens are read as memory maps, so that all processes of a machine share them. Nothing is ever deleted: delete the
    folder when you like.

    Args:
        folder: The folder; made when it is first written to.

    Example:
        >>> import tempfile
        >>> cache = TokenCache(tempfile.mkdtemp())
        >>> made = cache.get("some-key", lambda: {"input_ids": np.arange(3)})
        >>> cache.get("some-key", lambda: {})["input_ids"].tolist()
        [0, 1, 2]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays under a key; made and stored if they are not there, or damaged."""
        place = self.folder / key
        if (found := _read(place)) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock")):
            if (found := _read(place)) is not None:  # another process has made it meanwhile
                return found
            arrays = make()
            _write(place, arrays)
        return _read(place) or arrays


def key_of(
    columns: Sequence[Sequence[str]], tokenizer: Any, max_length: int, rules: Mapping[str, Any] | None = None
) -> str:
    """A name for the tokens of texts: a hash of the texts, the tokenizer's rules and the length at which it truncates.

    Args:
        columns: The texts; with two columns, each text is a pair.
        tokenizer: Fast tokenizer of transformers.
        max_length: Maximum number of tokens.
        rules: What else the tokens depend on, as JSON values. Default: nothing.

    Raises:
        ValueError: If the tokenizer is not a fast one, whose rules cannot be read.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"token_cache needs a fast tokenizer, got {type(tokenizer).__name__}, whose rules cannot be read; leave it "
            "out, or load the tokenizer with use_fast=True"
        )
    stated = {name: value for name, value in json.loads(backend.to_str()).items() if name not in _STATE_OF_CALLS}
    settings = {
        "rules": stated,
        "class": type(tokenizer).__name__,
        "inputs": tokenizer.model_input_names,
        "truncation_side": tokenizer.truncation_side,
        "max_length": max_length,
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers")],
        **({"more": dict(rules)} if rules else {}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for column in columns:
        digest.update(len(column).to_bytes(8, "big"))
        for text in column:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _read(place: Path) -> Arrays | None:
    """The arrays in a folder, memory-mapped; None if there is no such folder or a file of it is damaged."""
    try:
        names = json.loads((place / "names.json").read_text())
        # Numpy compares the size of a file with its header, so one that was cut short is never mapped.
        return {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError):
        return None


def _write(place: Path, arrays: Arrays) -> None:
    made = Path(tempfile.mkdtemp(prefix=".made-", dir=place.parent))
    try:
        for name, values in arrays.items():
            np.save(made / f"{name}.npy", values, allow_pickle=False)
        (made / "names.json").write_text(json.dumps(list(arrays)))
        shutil.rmtree(place, ignore_errors=True)  # only what is damaged can be there
        with suppress(OSError):  # where another process was faster in spite of the lock, as on some network disks
            made.replace(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Any:
    """Let one process of a machine at a time do the work; on disks without locks, each does it."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
