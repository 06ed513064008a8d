"""Base class of methods that keep tensors about the weights, such as an anchor or an importance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_warn
from evertune.callbacks.gradient_method import GradientMethod
from evertune.shards.fragments import FragmentState, saved_kinds, saved_shapes
from evertune.shards.names import matched
from evertune.shards.shards import ParameterShards
from evertune.shards.sidecars import read_sidecar, write_sidecar_with_checkpoints
from evertune.shards.support import is_sharded

Tensors = Mapping[str, list[Tensor]]
"""For each name, one flat fp32 tensor per fragment of the weights that this rank holds."""


class WeightMethod(GradientMethod):
    """Base class of methods that keep tensors about the weights, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    A method names its tensors and implements two formulas: the tensors that an experience leaves (:meth:`consolidate`),
    and what they add to the gradient of later experiences (:meth:`add_to_gradient`). Both see the weights as this rank
    holds them, so a method is written once for all strategies, and nothing is gathered.

    The rest is inherited. Lightning checkpoints contain the tensors (under DeepSpeed and FSDP2 in a subfolder, to which
    each rank writes its part); :meth:`save` writes them and :meth:`load` reads them at any world size. When a fit
    starts, they are rearranged to match the weights: the head may have grown, the strategy may have changed. New
    elements are zero. Weights that are frozen for a while keep their tensors (not under ZeRO), and those that become
    trainable within a fit get theirs at its end. Parameters are matched by name; wrappers such as ``torch.compile`` do
    not matter.

    Attributes:
        tensor_names: Names of the tensors, each with one fp32 number per trainable weight.
        tensors: The tensors by name, one flat tensor per fragment; empty until an experience has been learned, unless
            :meth:`begin` makes some.
        notes: What to know about the tensors, JSON values that are saved with them. :meth:`consolidate` sets it.

    Example::

        class L2SP(WeightMethod):
            tensor_names = ("anchor",)

            def consolidate(self, trainer, module, shards):
                return {"anchor": shards.values()}

            def add_to_gradient(self, shards):
                steps = zip(shards.values(), self.tensors["anchor"])
                shards.add_to_gradient(0.1 * (value - anchor) for value, anchor in steps)
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()
    time_part = "importance"

    notes: Mapping[str, Any] = MappingProxyType({})
    _state: FragmentState | None = None
    _saved_in: Path | None = None  # the folder passed to load(), until a fit reads it

    @classmethod
    def bytes_per_weight(cls) -> int | None:
        """Bytes that the tensors take per trainable weight that a rank updates; None if the arguments decide."""
        return 4 * len(cls.tensor_names)

    # --- the formulas

    @abstractmethod
    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors | None:
        """Return the tensors of the experience that ends, one list for each of ``tensor_names``. Called on every rank.

        ``self.tensors`` still holds the tensors of the previous experiences. Live weights in the result are copied.
        None keeps no tensors: those of the method belong to one experience.
        """

    def begin(self, shards: ParameterShards) -> Tensors | None:
        """The tensors before the first experience, or None (default) if there are none. Called on every rank."""
        return None

    def begin_parameter(self, kind: str, value: Tensor) -> Tensor | None:
        """The tensor of a fragment whose parameter had none, as it was frozen or not there. None (default) is zero.

        Args:
            kind: One of ``tensor_names``.
            value: The fragment's weights.
        """
        return None

    def prepare(self, shards: ParameterShards) -> None:
        """Build what :meth:`add_to_gradient` needs. Called when a fit starts and whenever the tensors change."""

    def check_notes(self, notes: Mapping[str, Any], origin: str) -> None:
        """Raise ``ValueError`` if this method cannot continue from tensors with these notes.

        Args:
            notes: The :attr:`notes` saved with the tensors.
            origin: Where they were found, for the message.
        """

    # --- their life

    @property
    def tensors(self) -> Tensors:
        return {} if self._state is None else self._state.tensors

    @property
    def has_state(self) -> bool:
        """Whether there are tensors: an experience has been learned, or :meth:`begin` made them."""
        return self._state is not None

    @property
    def acts(self) -> bool:
        return super().acts and self._state is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not self.tensor_names:
            raise ValueError(
                f'{type(self).__name__} names no tensors; set tensor_names on the class, such as ("anchor",)'
            )
        if is_sharded(trainer):
            write_sidecar_with_checkpoints(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rearrange the tensors to match this fit's fragments."""
        names = self._present_names(pl_module)
        self._start(trainer, also=names.values())
        assert self._shards is not None
        self._check_names(names, self._shards)
        if self._saved_in is not None:
            loaded = FragmentState.load(self._saved_in, self._shards, dtype=torch.float32, names=names)
            self._set(self._with_new(loaded, names.values(), self._shards))
            self._saved_in = None
        elif self._state is not None:
            self._rearrange(self._state.renamed(names), self._shards)
        elif (tensors := self.begin(self._shards)) is not None:
            self._keep(tensors, "begin", self._shards)

    def _rearrange(self, state: FragmentState, shards: ParameterShards) -> None:
        self._set(self._with_new(state.rearranged(shards), state.shapes, shards))

    def _with_new(self, state: FragmentState, known: Collection[str], shards: ParameterShards) -> FragmentState:
        """The state with the tensors of the parameters that had none."""
        for number, (fragment, value) in enumerate(zip(state.fragments, shards.values(), strict=True)):
            for kind in self.tensor_names if fragment.name not in known else ():
                if (tensor := self.begin_parameter(kind, value)) is not None:
                    state.tensors[kind][number] = _own(tensor, value)
        return state

    def _present_names(self, module: pl.LightningModule) -> dict[str, str]:
        """For each parameter with tensors, its name in the module; its own if the module does not have it."""
        if self._saved_in is not None:
            learned = saved_shapes(self._saved_in)
        else:
            learned = {} if self._state is None else self._state.shapes
        found = matched(learned, (name for name, _ in module.named_parameters()))
        return {name: found.get(name, name) for name in learned}

    def _check_names(self, names: Mapping[str, str], shards: ParameterShards) -> None:
        """Report parameters that this fit cannot protect."""
        missing = [name for name, here in names.items() if here not in shards.shapes]
        if not missing:
            return
        kept = " and ".join(self.tensor_names)
        words = f"{len(missing)} of the {len(names)} parameters of which {type(self).__name__} has {kept}"
        if len(missing) == len(names):
            raise ValueError(
                f"this module has none of the {words.partition(' of the ')[2]}: they are of {missing[0]!r}, the module "
                f"has {next(iter(shards.shapes), 'no trainable weights')!r}. Keep the names of the parameters from fit "
                f"to fit, or start with a new {type(self).__name__}"
            )
        rank_zero_warn(
            f"{words} are not in this module, or frozen under ZeRO, and are no longer protected: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the tensors of the experience.

        Raises:
            ValueError: If :meth:`consolidate` returns other tensors than ``tensor_names``.
        """
        shards = self._shards_now(trainer)
        tensors = self.consolidate(trainer, module, shards)
        if tensors is None:
            self._state = None
        else:
            self._keep(tensors, "consolidate", shards)

    def _keep(self, tensors: Tensors, formula: str, shards: ParameterShards) -> None:
        if set(tensors) != set(self.tensor_names):
            raise ValueError(
                f"{type(self).__name__}.{formula} returned {sorted(tensors)}, but tensor_names is {self.tensor_names}"
            )
        live = shards.values()
        own = {name: [_own(t, weight) for t, weight in zip(ts, live, strict=True)] for name, ts in tensors.items()}
        self._set(FragmentState.of(shards, own))

    def _shards_now(self, trainer: pl.Trainer) -> ParameterShards:
        """The weights that are trained by now: a callback may have made more of them trainable within the fit."""
        learned = {} if self._state is None else self._state.shapes
        shards = self._view(trainer, also=learned.keys())
        if self._shards is None or shards.shapes != self._shards.shapes:
            self._use(shards)
            if self._state is not None:
                self._rearrange(self._state, shards)
            return shards
        return self._shards

    def _set(self, state: FragmentState) -> None:
        self._state = state
        if self._shards is not None:
            self.prepare(self._shards)

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only; under ZeRO and FSDP2, the tensors are in the checkpoint's own folder."""
        state: dict[str, Any] = {"experience_index": self.experience_index}
        if self._state is not None and not self._state.sharded:
            state |= {**self._state.state_dict(), "notes": dict(self.notes)}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        if "tensors" in state_dict:
            self.check_notes(state_dict["notes"], "the checkpoint")
        self.experience_index = state_dict["experience_index"]
        if "tensors" in state_dict:
            self.notes = state_dict["notes"]
            self._state, self._saved_in = FragmentState.from_state_dict(state_dict), None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Under DeepSpeed and FSDP2, read the subfolder of the checkpoint."""
        if is_sharded(trainer):
            read_sidecar(trainer, self)

    def save(self, directory: str | Path) -> None:
        """Write the tensors to a folder (safetensors and JSON). Call on every rank.

        Raises:
            ValueError: If nothing has been learned yet.
        """
        if self._state is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} has nothing to save: no experience has been learned, or a loaded one not yet used"
            )
        self._state.save(directory, {"experience_index": self.experience_index, "notes": dict(self.notes)})

    def load(self, directory: str | Path) -> None:
        """Check a folder that :meth:`save` wrote and use it from the next fit on, at any world size.

        The fragments are read when that fit starts, so the folder must exist until then.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is corrupt, of another format, or of a method with other tensors.
        """
        extra, name = FragmentState.check(directory), type(self).__name__
        if "experience_index" not in extra:
            raise ValueError(f"{directory} holds fragments that {name} has not saved: they have no experience_index")
        if (found := saved_kinds(directory)) != sorted(self.tensor_names):
            raise ValueError(f"{directory} holds the tensors {found}, but {name} keeps {sorted(self.tensor_names)}")
        notes = dict(extra.get("notes", {}))
        self.check_notes(notes, str(directory))
        self.notes = notes
        self.experience_index = int(extra["experience_index"])
        self._saved_in = Path(directory)

    def __repr__(self) -> str:
        name, learned = type(self).__name__, f"{self.experience_index} learned"
        if self._saved_in is not None:
            return f"<{name}: experiences: {learned}, to be read from {self._saved_in} by the next fit>"
        if self._state is None:
            return f"<{name}: nothing learned yet>"
        weights = sum(shape.numel() for shape in self._state.shapes.values())
        size = sum(value.nbytes for values in self.tensors.values() for value in values)
        what = " and ".join(self.tensor_names)
        return f"<{name}: experiences: {learned}, {what} of {weights:,} weights, {size:,} bytes on this rank>"


def _own(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor in fp32, copied if it shares storage with the live weight."""
    own = tensor.detach().float()
    live = own.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return own.clone() if live else own
