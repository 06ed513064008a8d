"""How a model is trained, as far as it matters for what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]

PRECISIONS: tuple[str, ...] = get_args(Precision)

ALL = 2**31
"""More logits than any model has."""


class Sharding(NamedTuple):
    """What a strategy divides among the ranks.

    Args:
        stage: Stage of ZeRO, 3 for FSDP2; 0 for one device or DDP.
        offload: Whether what is divided is kept in the host's memory.
        fsdp2: Whether FSDP2 divides it: by rows, and without fp32 masters.
    """

    stage: int
    offload: bool = False
    fsdp2: bool = False


STRATEGIES: dict[str, Sharding] = {
    "ddp": Sharding(0),
    "evertune_deepspeed_stage_1": Sharding(1),
    "evertune_deepspeed_stage_2": Sharding(2),
    "evertune_fsdp2": Sharding(3, fsdp2=True),
    "evertune_deepspeed_stage_3": Sharding(3),
    "evertune_deepspeed_stage_2_offload": Sharding(2, offload=True),
    "evertune_deepspeed_stage_3_offload": Sharding(3, offload=True),
}
"""What each strategy divides, fastest first: those that communicate least."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained.

    Args:
        stage: Stage of ZeRO: 1, 2 or 3; 0 for one device or DDP.
        fsdp2: Whether FSDP2 divides the weights instead of DeepSpeed. Needs stage 3.
        world_size: Number of ranks.
        precision: Precision of the Trainer.
        offload: Whether the optimizer (at stage 3 also the weights) is kept in the host's memory. Needs stage 2 or 3.
        batch_size: Number of new examples in a micro-batch of one rank.
        seq_length: Number of tokens of an example.
        accumulation: Number of micro-batches in an optimizer step.
        method_bytes: Bytes that the methods keep for each weight that a rank updates, from their second experience on
            (``bytes_per_weight`` of their classes, added up).
        rank_ratio: Share of the directions of each matrix that OSFT protects; 0 without it.
        estimation_batch_size: Batch size with which a method goes over the experience again at its end to estimate the
            importance of the weights; 0 if no method does.
        replay_ratio: Number of replayed examples per new one; 0 without Replay.
        memory_size: Number of examples in the replay memory.
        stored_logits: Number of logits of each row that DarkReplay stores with the examples of the memory, :data:`ALL`
            for all; 0 without it.
        taught_logits: Number of logits of each row that Distillation keeps on each rank, as ``stored_logits``.
        n_taught: Number of examples of which Distillation keeps them.
        preemption: Whether the ranks agree after each batch on whether to stop.
        later_fit: Whether an earlier fit ran in the same process. In 16-bit training it leaves its fp32 masters.
        gpu: Whether the ranks compute on GPUs. On CPUs evertune uses smaller buckets and a fused optimizer.

    Raises:
        ValueError: If a value is out of range.
    """

    stage: int
    fsdp2: bool = False
    world_size: int = 1
    precision: Precision = "32-true"
    offload: bool = False
    batch_size: int = 32
    seq_length: int = 128
    accumulation: int = 1
    method_bytes: int = 0
    rank_ratio: float = 0.0
    estimation_batch_size: int = 0
    replay_ratio: float = 0.0
    memory_size: int = 0
    stored_logits: int = 0
    taught_logits: int = 0
    n_taught: int = 0
    preemption: bool = False
    later_fit: bool = True
    gpu: bool = True

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage must be 0, 1, 2 or 3, got {self.stage}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {self.precision!r}")
        for name in ("world_size", "batch_size", "seq_length", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.replay_ratio < 0:
            raise ValueError(f"replay_ratio must not be negative, got {self.replay_ratio}")
        if self.fsdp2 and (self.stage != 3 or self.offload):
            raise ValueError(f"fsdp2 needs stage 3 without offload, got stage {self.stage}, offload={self.offload}")
        if self.offload and self.stage < 2:
            raise ValueError(f"offload needs stage 2 or 3, got stage {self.stage}")

    @property
    def examples(self) -> int:
        """Number of examples in a micro-batch, the replayed ones included."""
        return self.batch_size + round(self.batch_size * self.replay_ratio)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed divides what is trained."""
        return self.stage > 0 and not self.fsdp2

    @property
    def widths(self) -> Widths:
        """Bytes per element, see :func:`widths`."""
        return widths(self.stage if self.deepspeed else 0, self.precision)

    @property
    def autocast(self) -> bool:
        """Whether autocast makes 16-bit copies of fp32 weights: in mixed precision without DeepSpeed."""
        return not self.deepspeed and self.precision.endswith("mixed")


class Widths(NamedTuple):
    """Bytes per element of the weights, gradients, fp32 masters and optimizer states."""

    weight: int
    gradient: int
    master: int
    state: int


def widths(stage: int, precision: Precision) -> Widths:
    """Bytes per element of the weights, the gradients, the fp32 masters and Adam's two moments together.

    Under DeepSpeed 16-bit training keeps 16-bit weights and gradients with fp32 masters and moments (``2 + 2 + 4 + 8``;
    Rajbhandari et al. 2020, section 3.1), also as ``bf16-mixed``. In fp32 its masters are a second copy of the weights.
    Without DeepSpeed there are no masters: mixed precision has fp32 weights, and ``bf16-true`` has 16-bit numbers only.

    >>> widths(2, "bf16-mixed"), widths(0, "bf16-mixed")
    (Widths(weight=2, gradient=2, master=4, state=8), Widths(weight=4, gradient=4, master=0, state=8))
    """
    if stage > 0:
        own = 4 if precision == "32-true" else 2
        return Widths(own, own, 4, 8)
    own = 2 if precision in ("bf16-true", "16-true") else 4
    return Widths(own, own, 0, 2 * own)
