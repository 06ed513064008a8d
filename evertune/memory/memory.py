"""The replay memory: a fixed number of past examples, shared by all ranks."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from evertune.memory.arrow import SCHEMA, checked_table, serialised
from evertune.memory.codec import encode
from evertune.memory.policies import Floats, Indices, Policy, make_policy
from evertune.memory.view import Label, MemoryView, mapped
from evertune.utils import typed_json
from evertune.utils.files import write_atomically
from evertune.utils.scratch import scratch_folder

Labels = Sequence[Label] | Callable[[Any], Label]
Content = Literal["examples", "prompts"]

_FORMAT = "evertune-memory-1"
_MANIFEST = "memory.json"
_CHUNK = 4096


@dataclass
class _Manifest:
    """The file that holds a saved memory, and its checksum."""

    file: str
    sha256: str


@dataclass
class _Settings:
    """The settings under which the examples of a file were chosen."""

    format: Literal["evertune-memory-1"]
    policy: str
    seed: int
    seen: int
    content: Content = "examples"


class Examples(Protocol):
    """The data that the memory learns from: anything with a length whose examples are read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ReplayMemory:
    """At most ``memory_size`` past examples, chosen by a policy, in one memory-mapped file.

    There is one logical memory regardless of the number of processes: they all open the same file (one per node), and
    which examples are in it depends only on the seed and the examples' ids. Examples are copied out of the dataset, as
    bytes and never as pickle; no reference to the dataset is kept.

    Args:
        memory_size: Number of examples kept in memory, over all ranks.
        policy: ``"reservoir"`` (default; a uniform sample of all examples seen), ``"class_balanced"``, ``"ring"`` (the
            newest of each class), ``"herding"`` (nearest to the class means in feature space), or a
            :class:`~evertune.memory.policies.Policy`.
        seed: Seed of the selection and of the order of the draws. Default: 0.
        directory: Folder for the working file, which is kept in a subfolder that is deleted with this object, or by the
            next memory there if the process is killed. By default the system's temporary folder. Use :meth:`save` to
            keep the memory.
        content: ``"examples"`` (default), or ``"prompts"`` for examples without their answers: a note for whoever reads
            the memory, which is kept with it. What is stored is what :meth:`update` is given.

    Raises:
        ValueError: If ``memory_size`` is not positive, ``seed`` is negative, or the policy is unknown.

    Example:
        >>> memory = ReplayMemory(memory_size=3)
        >>> memory.update([{"x": i} for i in range(100)], experience="digits")
        >>> memory.ids, memory[0]
        (['digits:9', 'digits:70', 'digits:96'], {'x': 9})
    """

    def __init__(
        self,
        memory_size: int,
        policy: str | Policy = "reservoir",
        seed: int = 0,
        directory: str | Path | None = None,
        content: Content = "examples",
    ) -> None:
        if memory_size <= 0:
            raise ValueError(f"memory_size must be positive, got {memory_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.memory_size = memory_size
        self.policy = make_policy(policy)
        self.seed = seed
        self.content = content
        self.generation = 0
        """Number of files written so far; readers reopen the file when it changes."""
        self._parent = directory
        self._directory: Path | None = None
        self._view: tuple[int, MemoryView] = (0, MemoryView.empty())

    # what it holds

    @property
    def view(self) -> MemoryView:
        """The current rows."""
        if self._view[0] != self.generation:
            self._view = self.generation, MemoryView.open(self.path(self.generation))
        return self._view[1]

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, slot: int) -> Any:
        return self.view[slot]

    @property
    def ids(self) -> list[str]:
        """The id of every slot."""
        return self.view.ids

    @property
    def labels(self) -> list[Label]:
        """The class of every slot; None for an example without one."""
        return self.view.labels

    def draw(self, positions: NDArray[np.int64], update: int) -> Indices:
        """See :meth:`MemoryView.draw`."""
        return self.view.draw(positions, update)

    def summary(self) -> dict[str, Any]:
        """Statistics for reports: ``size``, ``capacity``, and the counts ``per_experience`` and ``per_class``."""
        return {
            "size": len(self),
            "capacity": self.memory_size,
            "per_experience": dict(Counter(self.view.experiences)),
            "per_class": dict(Counter(label for label in self.labels if label is not None)),
        }

    # what goes in and out

    def update(
        self,
        dataset: Examples,
        experience: str,
        labels: Labels | None = None,
        ids: Sequence[str] | None = None,
        features: Floats | Tensor | None = None,
        *,
        is_writer: bool = True,
    ) -> None:
        """Offer every example of a dataset; only those that are kept are read and copied.

        Args:
            dataset: Dataset that is read by index.
            experience: Name of the experience being learned.
            labels: Class of every example, or a function that returns the class of an example. With a function,
                policies that balance classes read every example, the others only those that are kept.
            ids: Ids of the examples, for :meth:`forget` and to recognise an example that arrives again: the newer copy
                replaces the older. By default ``"<experience>:<number>"``.
            features: One vector per example, ``[n, d]``, for ``herding``.
            is_writer: Whether this process writes the file. On the other processes of a node, the call only switches to
                the file that the writer writes (wait for the writer before reading). Default: True.

        Raises:
            ValueError: If ``labels``, ``ids`` or ``features`` differ in length from ``dataset``, or the policy needs
                one that is missing.
            TypeError: If an example contains something that cannot be stored.
        """
        if is_writer:
            self._check_lengths(dataset, labels, ids, features)
            old, total = self.view, len(dataset)
            names = [f"{experience}:{index}" for index in range(total)] if ids is None else [str(id) for id in ids]
            classes = self._classes(dataset, experience, labels)
            vectors = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
            seen = old.settings.get("seen", 0)
            priorities = self.policy.priorities(
                names, classes, vectors, arrival=seen, seed=self.seed, size=self.memory_size
            )

            fresh: dict[str, int] = {}
            for index, name in enumerate(names):
                fresh.setdefault(name, index)
            stay = [slot for slot, id in enumerate(old.ids) if id not in fresh]
            come = list(fresh.values())
            table = old.table.take(pa.array(stay, pa.int64()))
            # Old rows first, then the new ones: an index below len(stay) is a row to copy, any other an example to
            # encode.
            chosen = self.policy.select(
                np.concatenate([table.column("priority").to_numpy(), priorities[come]]),
                [*table.column("id").to_pylist(), *fresh],
                [*table.column("label").to_pylist(), *(classes[index] for index in come)],
                self.memory_size,
            )
            kept, new = chosen[chosen < len(stay)], [come[row - len(stay)] for row in chosen if row >= len(stay)]
            rows = []
            for index in new:
                example = dataset[index]
                label = labels(example) if callable(labels) else classes[index]
                rows.append(
                    {
                        "id": names[index],
                        "label": label,
                        "experience": experience,
                        "priority": float(priorities[index]),
                        "length": length_of(example),
                        "data": encode(example),
                    }
                )
            self._write([table.take(pa.array(kept)), pa.Table.from_pylist(rows, schema=SCHEMA)], seen + total)
        self.generation += 1

    def add(
        self,
        examples: Iterable[Any],
        experience: str,
        labels: Callable[[Any], Label] | None = None,
        ids: Callable[[Any], str] | None = None,
    ) -> None:
        """Offer examples one after another, as from a stream: each is read only once, and none needs an index.

        Args:
            examples: Examples; an endless iterable must be stopped by the caller.
            experience: Name of the experience being learned.
            labels: Function that returns the class of an example.
            ids: Function that returns the id of an example. By default a hash of its content, so that equal examples
                are stored once.
        """
        identify = ids or (lambda example: content_id(encode(example)))
        iterator = iter(examples)
        while chunk := list(itertools.islice(iterator, _CHUNK)):
            self.update(chunk, experience, labels, [identify(example) for example in chunk])

    def set_logits(self, slots: Sequence[int], logits: pa.StructArray, *, is_writer: bool = True) -> None:
        """Store logits with examples. The file is rewritten; readers that have it open keep the old one.

        On other processes than the writer, the call only opens the file again: wait for the writer before it.

        Args:
            slots: The examples.
            logits: Their logits (:meth:`StoredLogits.to_arrow <evertune.memory.logits.StoredLogits.to_arrow>`).
            is_writer: As for :meth:`update`.
        """
        if is_writer:
            view = self.view
            old = view.table.column("logits").combine_chunks()
            places = np.arange(len(view))
            places[np.asarray(slots, dtype=np.int64)] = len(view) + np.arange(len(logits))
            column = pa.concat_arrays([old, logits]).take(pa.array(places))
            table = view.table.set_column(SCHEMA.get_field_index("logits"), SCHEMA.field("logits"), column)
            write_atomically(self.path(self.generation), serialised(table, view.settings))
        self._view = (-1, MemoryView.empty())

    def fill(self, view: MemoryView, slots: Sequence[int], examples: Sequence[Any], *, is_writer: bool = True) -> None:
        """Replace the content by examples that were made from those of another memory, and keep their ids and classes.

        Args:
            view: The other memory.
            slots: Slots of the examples there.
            examples: What was made of each of them.
            is_writer: As for :meth:`update`.
        """
        if is_writer:
            table = view.table.take(pa.array(slots, pa.int64()))
            made = {"length": [length_of(one) for one in examples], "data": [encode(one) for one in examples]}
            for name, values in made.items():
                field = SCHEMA.field(name)
                table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))
            self._write([table], view.settings.get("seen", 0))
        self.generation += 1

    def forget(self, ids: Iterable[str], is_writer: bool = True) -> int:
        """Erase examples: the file is rewritten without them, older files are deleted, and the new file is searched.

        Folders written by :meth:`save` are not changed: save again.

        Args:
            ids: Ids to erase; ids that the memory does not hold are ignored.
            is_writer: As for :meth:`update`.

        Returns:
            The number of examples erased.

        Raises:
            RuntimeError: If the bytes of an erased example are still in the file.
        """
        wanted, old = set(ids), self.view
        gone = [slot for slot, id in enumerate(old.ids) if id in wanted]
        if not gone:
            return 0
        if is_writer:
            stay = sorted(set(range(len(old))) - set(gone))
            erased = [bytes(old.encoded(slot)) for slot in gone]
            # An example with identical content under another id may stay, so its bytes are no evidence of a failure.
            kept = {bytes(old.encoded(slot)) for slot in stay}
            self._write([old.table.take(pa.array(stay, pa.int64()))], old.settings["seen"])
            self._delete_older(than=self.generation + 1)
            content = self.path(self.generation + 1).read_bytes()
            if any(data in content for data in erased if data not in kept):
                raise RuntimeError(f"{self.path(self.generation + 1)} still holds erased examples")
        self.generation += 1
        return len(gone)

    def undo_point(self, is_writer: bool = True) -> Callable[[], None]:
        """Return a function that puts the content back as it is now, whatever was learned or loaded in between.

        Args:
            is_writer: As for :meth:`update`.
        """
        generation, view = self.generation, self.view
        data = self._file() if is_writer else None  # a map of the file, which can be read when it is deleted

        def undo() -> None:
            if data is not None and generation and not self.path(generation).exists():
                write_atomically(self.path(generation), data)
            self.generation, self._view = generation, (generation, view)

        return undo

    # where it is kept

    def save(self, directory: str | Path) -> None:
        """Write the memory to a folder: an Arrow file and ``memory.json``, which holds its name and SHA-256.

        If interrupted, the folder holds either the old memory or the new one, never a mixture.
        """
        folder, data = Path(directory), self._file()
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(data).hexdigest()
        name = f"memory-{digest[:16]}.arrow"
        write_atomically(folder / name, data)
        manifest = self._settings() | {"examples": len(self), "file": name, "sha256": digest}
        write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
        for stale in folder.glob("memory-*.arrow"):
            if stale.name != name:
                stale.unlink(missing_ok=True)

    def load(self, directory: str | Path, is_writer: bool = True) -> None:
        """Replace the content of this memory by that of a folder that :meth:`save` wrote.

        If this memory is smaller, the policy chooses what to keep.

        Raises:
            FileNotFoundError: If the folder holds no memory.
            ValueError: If the memory is corrupt, truncated or a pickle, or was filled under another policy or seed.
        """
        path = Path(directory) / _MANIFEST
        content = path.read_bytes()
        _refuse_pickle(content, path)
        try:
            manifest = typed_json.read_json(_Manifest, content)
        except ValueError as error:
            raise ValueError(f"{path} is corrupt or truncated: {error}") from error
        name, digest = manifest.file, manifest.sha256
        if Path(name).name != name:
            raise ValueError(f"{path} names a file outside its folder: {name!r}")
        file = Path(directory) / name
        self._adopt(mapped(file) if file.stat().st_size else pa.py_buffer(b""), digest, str(file), is_writer)

    def state_dict(self, generation: int | None = None) -> dict[str, Any]:
        """The memory as plain tensors and strings, for a checkpoint.

        Args:
            generation: Generation to save: the newest (default) or the one before it.
        """
        data = self._file(generation)
        return {
            "arrow": torch.frombuffer(bytearray(data), dtype=torch.uint8),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any], is_writer: bool = True) -> None:
        """Replace the content of this memory by a :meth:`state_dict`. Raises the same errors as :meth:`load`."""
        self._adopt(pa.py_buffer(state["arrow"].numpy()), state["sha256"], "the memory in this checkpoint", is_writer)

    def path(self, generation: int) -> Path:
        """The working file of a generation; only the newest and the one before it exist."""
        return working_file(self.directory, generation)

    @property
    def directory(self) -> Path:
        """The folder of the working files."""
        if self._directory is None:
            if self._parent is not None:
                Path(self._parent).mkdir(parents=True, exist_ok=True)
            self._directory = scratch_folder(self, "evertune-memory-", self._parent)
        return self._directory

    def share(self, directory: str | Path, generation: int, is_writer: bool) -> None:
        """Switch to the files in ``directory``, together with the other processes of this node.

        Args:
            directory: Folder, the same on all of these processes.
            generation: Generation, the same on all of these processes.
            is_writer: True on exactly one of them, which writes the content of its memory there.
        """
        data = self._file() if is_writer else None
        self._directory = Path(directory)
        if data is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(generation), data)
            weakref.finalize(self, _remove, self._directory, os.getpid())
        # Generation 0 is empty and has no file.
        self.generation, self._view = generation, (0 if generation == 0 else -1, MemoryView.empty())

    # files

    def _settings(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "policy": self.policy.name,
            "seed": self.seed,
            "content": self.content,
            "memory_size": self.memory_size,
        }

    def _file(self, generation: int | None = None) -> pa.Buffer:
        """The bytes of the working file."""
        generation = self.generation if generation is None else generation
        if generation == 0:
            return serialised(SCHEMA.empty_table(), self._settings() | {"seen": 0})
        return mapped(self.path(generation))

    def _write(self, tables: list[pa.Table], seen: int) -> None:
        """Write the file of the next generation."""
        table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
        write_atomically(self.path(self.generation + 1), serialised(table, self._settings() | {"seen": seen}))
        # The previous file stays: loader workers may still draw from it.
        self._delete_older(than=self.generation)

    def _delete_older(self, than: int) -> None:
        for path in self.directory.glob("memory-*.arrow"):
            if int(path.stem.removeprefix("memory-")) < than:
                path.unlink(missing_ok=True)

    def _adopt(self, data: pa.Buffer, digest: str, source: str, is_writer: bool) -> None:
        _refuse_pickle(bytes(data[:2]), source)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{source} is corrupt or truncated: its sha256 is not the one recorded when it was saved")
        try:
            view = MemoryView(checked_table(data))
            settings = typed_json.from_json(_Settings, view.settings)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{source} is corrupt, or is not a replay memory of this version: {error}") from error
        for name, mine in (("policy", self.policy.name), ("seed", self.seed), ("content", self.content)):
            if (filled := getattr(settings, name)) != mine:
                raise ValueError(
                    f"{source} was filled with {name}={filled!r}, this memory has {name}={mine!r}; "
                    "what was kept under one does not merge with the other"
                )
        if is_writer:
            table = view.table
            kept = self.policy.select(table.column("priority").to_numpy(), view.ids, view.labels, self.memory_size)
            self._write([table.take(pa.array(kept))], settings.seen)
        self.generation += 1

    # checks

    def _check_lengths(
        self, dataset: Examples, labels: Labels | None, ids: Sequence[str] | None, features: Floats | Tensor | None
    ) -> None:
        for name, values in (("labels", labels), ("ids", ids), ("features", features)):
            if values is not None and not callable(values) and len(values) != len(dataset):
                raise ValueError(f"got {len(values)} {name} for {len(dataset)} examples")
        if self.policy.needs_features and features is None:
            raise ValueError(f"policy {self.policy.name!r} needs features, one vector for every example")

    def _classes(self, dataset: Examples, experience: str, labels: Labels | None) -> list[Label]:
        if callable(labels):
            if not self.policy.needs_labels:
                return [None] * len(dataset)
            labels = [labels(dataset[index]) for index in range(len(dataset))]
        classes: list[Label] = [None] * len(dataset) if labels is None else list(labels)
        if self.policy.needs_labels and None in classes:
            raise ValueError(
                f"policy {self.policy.name!r} needs the class of every example; "
                f"example {classes.index(None)} of experience {experience!r} has none"
            )
        return classes


def forget_saved(directory: str | Path, ids: Iterable[str]) -> int:
    """Erase examples from a folder that :meth:`ReplayMemory.save` wrote: its Arrow file is replaced by one without
    them.

    Args:
        directory: Folder of the memory.
        ids: Ids to erase; ids that the memory does not hold are ignored.

    Returns:
        The number of examples erased.

    Raises:
        ValueError: If the file is damaged.
    """
    folder, wanted = Path(directory), set(ids)
    manifest = json.loads((folder / _MANIFEST).read_bytes())
    view = MemoryView.open(folder / manifest["file"])
    stay = [slot for slot, id in enumerate(view.ids) if id not in wanted]
    if len(stay) == len(view):
        return 0
    data = serialised(view.table.take(pa.array(stay, pa.int64())), view.settings)
    digest = hashlib.sha256(data).hexdigest()
    manifest |= {"examples": len(stay), "file": f"memory-{digest[:16]}.arrow", "sha256": digest}
    write_atomically(folder / manifest["file"], data)
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
    for stale in folder.glob("memory-*.arrow"):
        if stale.name != manifest["file"]:
            stale.unlink(missing_ok=True)
    return len(view) - len(stay)


def working_file(directory: Path, generation: int) -> Path:
    """The path of a generation's file in the working folder of a memory."""
    return directory / f"memory-{generation}.arrow"


def content_id(data: bytes) -> str:
    """The id of an example without its own: a hash of its encoded bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def length_of(example: Any) -> int | None:
    """The number of tokens of an example, by its ``input_ids``; None if it has none.

    Example:
        >>> length_of({"input_ids": torch.zeros(7), "labels": "sport"}), length_of({"input_ids": [1, 2]}), length_of(3)
        (7, 2, None)
    """
    tokens = example.get("input_ids") if isinstance(example, Mapping) else None
    if isinstance(tokens, list | tuple):
        return len(tokens)
    shape: Sequence[int] = getattr(tokens, "shape", ())
    return int(shape[-1]) if shape else None


def _refuse_pickle(data: bytes, source: str | Path) -> None:
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise ValueError(f"{source} is a pickle (or a torch.save file), which can run code; evertune never loads one")


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked loader worker
        shutil.rmtree(directory, ignore_errors=True)
