"""State in weight space, kept and saved as each rank holds it: importance, anchors and similar."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evertune.shards.shards import Fragment, ParameterShards, where_ranks_meet
from evertune.utils.files import sha256
from evertune.utils.ranks import barrier, rank_and_world_size
from evertune.utils.typed_json import decode, from_json

_INDEX = "index.json"
_FORMAT = "evertune-fragments"


@dataclass
class FragmentState:
    """This rank's fragments of named tensors over the trainable weights, such as ``importance`` and ``anchor``.

    Args:
        fragments: Elements that this rank holds.
        shapes: Name to full shape of every parameter, the same on all ranks.
        sharded: Whether the ranks hold different fragments.
        tensors: For each name, one flat tensor per fragment.
    """

    fragments: list[Fragment]
    shapes: dict[str, torch.Size]
    sharded: bool
    tensors: dict[str, list[Tensor]]

    @classmethod
    def of(cls, shards: ParameterShards, tensors: dict[str, list[Tensor]]) -> FragmentState:
        """State laid out as ``shards`` are now."""
        return cls(shards.fragments, shards.shapes, shards.sharded, tensors)

    def renamed(self, names: Mapping[str, str]) -> FragmentState:
        """The same state under the names that the parameters have now; those not in ``names`` keep theirs."""
        fragments = [replace(f, name=names.get(f.name, f.name)) for f in self.fragments]
        shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}
        return FragmentState(fragments, shapes, self.sharded, self.tensors)

    def rearranged(self, shards: ParameterShards) -> FragmentState:
        """The same state laid out as ``shards`` are now; see ``ParameterShards.rearrange``. Call on every rank."""
        moved = self.fragments != shards.fragments or self.shapes != shards.shapes or self.sharded != shards.sharded
        # All ranks must rearrange if one has to: it is a collective.
        if not shards.sum_over_ranks(torch.tensor(float(moved))).item():
            own = shards.values()  # tensors from a checkpoint are on the CPU
            return FragmentState.of(
                shards,
                {
                    kind: [value.to(weight.device) for value, weight in zip(values, own, strict=True)]
                    for kind, values in self.tensors.items()
                },
            )
        tensors = {
            kind: shards.rearrange(
                {f.name: (f.offset, value) for f, value in zip(self.fragments, values, strict=True)},
                old_sharded=self.sharded,
            )
            for kind, values in self.tensors.items()
        }
        return FragmentState.of(shards, tensors)

    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors and shapes, for a single-file checkpoint. Not for sharded state."""
        assert not self.sharded
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "tensors": {
                kind: {f.name: value for f, value in zip(self.fragments, values, strict=True)}
                for kind, values in self.tensors.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FragmentState:
        """The state from :meth:`state_dict`."""
        shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
        fragments = [Fragment(name, shape, 0, shape.numel()) for name, shape in shapes.items()]
        tensors = {kind: [values[f.name] for f in fragments] for kind, values in state["tensors"].items()}
        return cls(fragments, shapes, False, tensors)

    def save(self, directory: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write a folder: one safetensors file per rank that holds its own part, and a JSON index.

        Call on every rank, with the same folder. The result loads at any world size.

        Args:
            directory: Folder to write, created if missing.
            extra: JSON values to keep with the state.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        rank, world_size = rank_and_world_size()
        writers = world_size if self.sharded else 1
        digest = torch.zeros(32, dtype=torch.uint8)
        if rank < writers:
            path = directory / _file_name(rank, writers)
            pieces = {
                f"{kind}|{f.offset}|{f.name}": value.detach().cpu().contiguous()
                for kind, values in self.tensors.items()
                for f, value in zip(self.fragments, values, strict=True)
            }
            save_file(pieces, path)
            digest = torch.tensor(list(bytes.fromhex(sha256(path))), dtype=torch.uint8)
        digests = [digest]
        if writers > 1:
            # Only rank 0 writes the index, so it needs the digests of the other ranks' files.
            digest = where_ranks_meet(digest)
            digests = [torch.zeros_like(digest) for _ in range(writers)]
            dist.all_gather(digests, digest)
        if rank == 0:
            index = {
                "format": _FORMAT,
                "version": 1,
                "kinds": sorted(self.tensors),
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "files": {_file_name(r, writers): bytes(d.tolist()).hex() for r, d in enumerate(digests)},
                "extra": dict(extra or {}),
            }
            (directory / _INDEX).write_text(json.dumps(index, indent=1))
        barrier()

    @staticmethod
    def check(directory: str | Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
        """Verify the files of a folder against the digests in its index. Returns the ``extra`` passed to :meth:`save`.

        Args:
            directory: Folder that :meth:`save` wrote.
            share: ``(rank, world size)`` of processes that share the verification. By default all files are verified.

        Raises:
            FileNotFoundError: If the folder or one of its files is missing.
            ValueError: If the index or a file was truncated or edited, or is of another format.
        """
        index = _read_index(Path(directory))
        rank, world_size = share
        for name, expected in sorted(index["files"].items())[rank::world_size]:
            path = Path(directory) / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; the saved state in {directory} is not complete")
            if sha256(path) != expected:
                raise ValueError(f"{path} is corrupt: its content does not have the digest that {_INDEX} states")
        extra: dict[str, Any] = index["extra"]
        return extra

    @classmethod
    def load(
        cls,
        directory: str | Path,
        shards: ParameterShards,
        kinds: Collection[str] | None = None,
        dtype: torch.dtype | None = None,
        names: Mapping[str, str] | None = None,
    ) -> FragmentState:
        """Read this rank's fragments as ``shards`` are laid out now, whatever world size wrote the folder.

        Elements that the saved state does not have (of a head that has grown since) are zero.

        Args:
            directory: Folder that :meth:`save` wrote.
            shards: Current layout of the weights.
            kinds: Names of the tensors to read. By default all.
            dtype: Type of the returned tensors. By default that of the weights.
            names: Present names of parameters that were saved under others.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If :meth:`save` did not write the folder.
        """
        from safetensors import SafetensorError, safe_open

        directory = Path(directory)
        index = _read_index(directory)
        here = {fragment.name: (i, fragment) for i, fragment in enumerate(shards.fragments)}
        tensors = {kind: shards.zeros(dtype) for kind in index["kinds"] if kinds is None or kind in kinds}
        for file_name in index["files"]:
            try:
                with safe_open(directory / file_name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118  (not a dict)
                        # At most two splits: a parameter's name may contain the separator.
                        kind, start_text, name = key.split("|", 2)
                        name = (names or {}).get(name, name)
                        if name in here and kind in tensors:
                            i, fragment = here[name]
                            _copy_overlap(file.get_slice(key), int(start_text), fragment, tensors[kind][i])
            except (SafetensorError, ValueError) as error:
                raise ValueError(
                    f"{directory / file_name} is not a safetensors file or is truncated: {error}"
                ) from None
        return cls.of(shards, tensors)


def saved_shapes(directory: str | Path) -> dict[str, torch.Size]:
    """Name to full shape of every parameter in a saved :class:`FragmentState`.

    Raises:
        FileNotFoundError: If the folder or its index is missing.
        ValueError: If the index is damaged.
    """
    return {name: torch.Size(shape) for name, shape in _read_index(Path(directory))["shapes"].items()}


def saved_kinds(directory: str | Path) -> list[str]:
    """Names of the tensors in a folder that :meth:`FragmentState.save` wrote.

    Raises:
        FileNotFoundError: If the folder or its index is missing.
        ValueError: If the index is damaged.
    """
    return list(_read_index(Path(directory))["kinds"])


@dataclass
class _Index:
    """The content of the index."""

    kinds: list[str]
    shapes: dict[str, list[int]]
    files: dict[str, str]
    extra: dict[str, Any]


def _copy_overlap(saved: Any, start: int, fragment: Fragment, into: Tensor) -> None:
    end = start + saved.get_shape()[0]
    first, last = max(start, fragment.offset), min(end, fragment.offset + fragment.numel)
    if first < last:
        into[first - fragment.offset : last - fragment.offset] = saved[first - start : last - start].to(into.device)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass the folder that save() wrote")
    try:
        index = decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the saved state is corrupt") from None
    if not isinstance(index, dict) or index.get("format") != _FORMAT or index.get("version") != 1:
        raise ValueError(f"{path} is not an index of format {_FORMAT!r} version 1")
    if missing := {"kinds", "shapes", "files", "extra"} - index.keys():
        raise ValueError(f"{path} is damaged: it has no {sorted(missing)}")
    try:
        parsed = from_json(_Index, index)
        if outside := [name for name in parsed.files if Path(name).name != name]:
            raise ValueError(f"it names a file outside its folder: {outside[0]!r}")
        if negative := [name for name, shape in parsed.shapes.items() if min(shape, default=0) < 0]:
            raise ValueError(f"the shape of {negative[0]!r} is {parsed.shapes[negative[0]]}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return vars(parsed)


def _file_name(rank: int, writers: int) -> str:
    return f"fragments-{rank:05d}-of-{writers:05d}.safetensors"
