"""OSFT: the top singular directions of every matrix stay as they are, exactly, under any optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks.weight_method import WeightMethod
from evertune.shards.fragments import FragmentState, saved_shapes
from evertune.shards.shards import ParameterShards
from evertune.shards.subspaces import Sides, Subspaces

HEADS = ("head", "heads", "lm_head", "classifier", "score")


class OSFT(WeightMethod):
    """Orthogonal-subspace fine-tuning, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    All weights are trained, but an update leaves the top singular directions of each matrix as they were when it
    started (Nayak et al. 2025, "Sculpting subspaces: constrained full fine-tuning in LLMs for continual learning").
    With the singular value decomposition ``W = U S V^T`` at the start of the update, of which ``U_h`` (m x r) and
    ``V_h`` (n x r) are the top ``r`` directions, after every step of the optimizer::

        W <- W_start + P(W - W_start)
        P(D) = (I - U_h U_h^T) D (I - V_h V_h^T)    with sides="either"
        P(D) = D - U_h U_h^T D V_h V_h^T            with sides="both"

    The paper states the second, for the gradient. Its code, and PEFT's OSF, train the remaining factors ``U_l, S_l,
    V_l`` with gradients orthogonal to ``U_h`` and ``V_h``, which allows only the first. Here the whole change of the
    weights is projected, with weight decay and what other methods move: an optimizer that scales elements, such as
    Adam, turns a projected gradient into a step that is not projected.

    What is left of an update in the protected space is the rounding of fp32 weights, about 4e-8 of their norm however
    many steps are taken. Biases, normalisation, embeddings and the head are trained freely. Each update protects the
    directions of the weights that it starts from; weights that are unfrozen within one are protected from the next on.
    The layer importance of the paper, by which ``r`` varies between layers, needs activations on old data and is not
    used.

    A step costs four products of the size ``m x n x r`` per matrix, divided among the ranks where the weights are
    sharded. Then the ranks exchange two matrices of ``r x n``, those of many matrices in one collective. At the start
    of an update, each matrix is put together on one rank and decomposed there; the ranks take turns. State: one number
    for each protected weight that a rank holds, and during a fit its rows of ``U_h`` and an equal share of ``V_h``, or
    all of both if the weights are replicated.

    Args:
        rank_ratio: Share of the singular directions of a matrix, in (0, 1], that are protected: ``r = floor(rank_ratio
            * min(m, n))``. A sequence gives that of the first update, the second, and so on; the last is that of all
            later ones. Default: ``(0.3, 0.5, 0.7)``: more is protected as more has been learned, as in PEFT's example
            of the method. Not tuned.
        sides: ``"either"`` (default): an update has no protected direction on either side, so that inputs along
            ``V_h`` give the same outputs as before, and outputs along ``U_h`` come from the same inputs. ``"both"``:
            only its part between protected inputs and protected outputs is removed, as the paper's formula has it;
            this leaves an update more room, but such inputs may get other outputs.
        embeddings: Whether the matrices of embeddings are protected, too. Default: False; most of their rows do not
            change in an update.
        exclude: Parts of names; layers that have one in their names are trained freely. Default: names of heads, which
            have to learn new classes.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy is not supported; before the first
            step, if there are several optimizers, nothing to protect, or weights that are not kept in fp32, in whose
            rounding the projection would be lost.

    Example::

        osft = OSFT(rank_ratio=0.5)
        pl.Trainer(max_epochs=3, callbacks=[osft]).fit(module, first_data)
        pl.Trainer(max_epochs=3, callbacks=[osft]).fit(module, second_data)
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("start",)
    constrains_steps = True

    def __init__(
        self,
        rank_ratio: float | Sequence[float] = (0.3, 0.5, 0.7),
        sides: Sides = "either",
        embeddings: bool = False,
        exclude: Collection[str] = HEADS,
    ) -> None:
        ratios = [rank_ratio] if isinstance(rank_ratio, int | float) else list(rank_ratio)
        if not ratios:
            raise ValueError("rank_ratio must not be empty: give the share of the first update, or one for all")
        for ratio in ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"rank_ratio must be above 0 and at most 1, got {ratio}")
        if sides not in get_args(Sides):
            raise ValueError(f"sides must be 'either' or 'both', got {sides!r}")
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a collection of names, got the string {exclude!r}")
        self.rank_ratio = tuple(float(ratio) for ratio in ratios)
        self.sides: Sides = sides
        self.embeddings = embeddings
        self.exclude = frozenset(exclude)
        self._subspaces: Subspaces | None = None  # within an update

    @property
    def ratio(self) -> float:
        """The share of the directions that this update protects, or the next."""
        return self.rank_ratio[min(self.experience_index, len(self.rank_ratio) - 1)]

    @classmethod
    def bytes_per_weight(cls) -> None:
        """It depends on ``rank_ratio``, and on which weights are matrices."""

    @property
    def acts(self) -> bool:
        return self._shards is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and forget the start of an update that failed."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._state = self._subspaces = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices, and in a fit that resumes, the weights from which its update started."""
        super().on_train_start(trainer, pl_module)
        assert self._shards is not None
        name = type(self).__name__
        if not self._shards.shapes:
            raise ValueError(
                f"{name} finds no matrix to protect: no layer of {type(pl_module).__name__} that is trained is an "
                f"nn.Linear{' or an nn.Embedding' if self.embeddings else ''} outside of {sorted(self.exclude)}"
            )
        if not any(self._ranks(self._shards).values()):
            raise ValueError(
                f"rank_ratio={self.ratio} protects nothing: the largest matrix has "
                f"{max(min(shape) for shape in self._shards.shapes.values())} directions"
            )
        for fragment, value in zip(self._shards.fragments, self._shards.values(), strict=True):
            if value.dtype != torch.float32:
                raise ValueError(
                    f"{name} needs weights that are kept in float32, but {fragment.name} is {value.dtype}, and what is "
                    "protected would be lost in its rounding: use precision='bf16-mixed', or DeepSpeed, which keeps "
                    "float32 masters"
                )

    def _view(self, trainer: pl.Trainer, also: Collection[str] = ()) -> ParameterShards:
        return super()._view(trainer, also).only(self.matrices(trainer.lightning_module))

    def matrices(self, module: nn.Module) -> list[str]:
        """The names of the matrices of a module that this method protects."""
        layers = list(module.named_modules())
        embeddings = {id(p) for _, layer in layers if isinstance(layer, nn.Embedding) for p in layer.parameters()}
        found = set(embeddings) if self.embeddings else set()
        for path, layer in layers:
            linear = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"  # as GPT-2 calls its own
            if linear and self.exclude.isdisjoint(path.split(".")):
                found |= {id(layer.weight)} - embeddings
        return [name for name, p in module.named_parameters() if id(p) in found]

    def _ranks(self, shards: ParameterShards) -> dict[str, int]:
        """The number of directions of each matrix that this update protects."""
        return {name: int(self.ratio * min(shape)) for name, shape in shards.shapes.items()}

    # --- an update

    def begin_parameter(self, kind: str, value: Tensor) -> Tensor:
        """Weights that become trainable start where they are."""
        return value

    def observe_gradient(self, shards: ParameterShards) -> None:
        """Before the first step of an update, note where the weights start, and find what to protect."""
        if self._subspaces is not None:
            return
        if self._state is None:
            self._keep({"start": shards.values()}, "begin", shards)
        self._subspaces = Subspaces(shards, self.tensors["start"], self._ranks(shards), self.sides)

    def constrain_step(self, names: list[str], values: dict[int, Tensor]) -> None:
        """Remove what has changed in the protected directions since the update started."""
        assert self._subspaces is not None
        start = self.tensors["start"]
        for number, value in values.items():
            value.sub_(start[number])
        self._subspaces.remove(names, values)
        for number, value in values.items():
            value.add_(start[number])

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Keep nothing: the next update starts from other weights, and protects other directions."""
        self._subspaces = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the directions, and the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._subspaces = None

    # --- what is saved

    @property
    def has_state(self) -> bool:
        """Always: between two updates, it is the number of experiences."""
        return True

    def save(self, directory: str | Path) -> None:
        """Write to a folder the number of experiences, and during an update where it started. Call on every rank."""
        if self._state is not None:
            super().save(directory)
        else:
            FragmentState([], {}, False, {"start": []}).save(directory, {"experience_index": self.experience_index})

    def load(self, directory: str | Path) -> None:
        """Check a folder that :meth:`save` wrote and use it from the next fit on, at any world size.

        If it was written during an update, that fit continues the update, and reads the folder when it starts.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is corrupt, of another format, or of a method with other tensors.
        """
        super().load(directory)
        if not saved_shapes(directory):
            self._saved_in = None

    def __repr__(self) -> str:
        return f"<OSFT: experiences: {self.experience_index} learned, the next update protects {self.ratio:.0%}>"
