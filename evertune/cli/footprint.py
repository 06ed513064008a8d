"""What training costs each rank, by formula: bytes of memory, and bytes sent in an optimizer step.

``docs/scaling.md`` gives the formulas, their sources and how they compare with measurements;
``benchmarks/scaling.py`` is what measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank (``stage3_param_persistence_threshold``)."""

PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead of their use (``stage3_prefetch_bucket_size``)."""

GPU_BUCKET, CPU_BUCKET = 200_000_000, 10_000_000
"""Elements of gradients that are reduced together: Lightning's default on a GPU, evertune's on a CPU."""

GPU_CHUNK, CPU_CHUNK = 1 << 24, 1 << 16
"""Elements of a weight that a penalty processes at a time."""

TOKEN_COLUMNS, RECORD = 2, 250
"""Numbers that the replay memory keeps for each token (its id and its type), and further bytes for each example."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that determine its cost.

    Args:
        groups: Number of elements of each trainable parameter, by parameter group of the optimizer.
        frozen: Number of elements of each parameter that is not trained.
        layers: Number of transformer layers that the backward pass goes through.
        hidden: Number of features of a token between layers.
        intermediate: Number of features inside the feed-forward part of a layer.
        heads: Number of attention heads.
        kv_heads: Number of heads of the attention's keys and values.
        gated: Whether the feed-forward part has a gate (SwiGLU), and so three matrices instead of two.
        rms_norm: Whether the norms are RMSNorm, which transformers computes in fp32.
        dropout: Whether any layer uses dropout.
        eager_attention: Whether attention keeps the scores of all pairs of tokens, which fused kernels do not.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...] = ()
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    gated: bool = False
    rms_norm: bool = False
    dropout: bool = True
    eager_attention: bool = False

    @property
    def trainable(self) -> int:
        """Number of elements that are trained."""
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        """Number of all elements, the frozen ones included."""
        return self.trainable + sum(self.frozen)

    @property
    def largest(self) -> int:
        """Number of elements of the largest parameter."""
        return max((size for sizes in (*self.groups, self.frozen) for size in sizes), default=0)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained.

    Args:
        stage: Stage of ZeRO: 1, 2 or 3; 0 for one device or DDP.
        world_size: Number of ranks.
        precision: Precision of the Trainer.
        offload: Whether the optimizer (at stage 3 also the weights) is kept in the host's memory. Needs stage 2 or 3.
        batch_size: Number of new examples in a micro-batch of one rank.
        seq_length: Number of tokens of an example.
        accumulation: Number of micro-batches in an optimizer step.
        method_bytes: Bytes that the methods keep for each weight that a rank updates, from their second experience on
            (``bytes_per_weight`` of their classes, added up).
        estimation_batch_size: Batch size with which a method goes over the experience again at its end to estimate the
            importance of the weights; 0 if no method does.
        replay_ratio: Number of replayed examples per new one; 0 without Replay.
        memory_size: Number of examples in the replay memory.
        preemption: Whether the ranks agree after each batch on whether to stop.
        later_fit: Whether an earlier fit ran in the same process. In 16-bit training it leaves its fp32 masters.
        gpu: Whether the ranks compute on GPUs. On CPUs evertune uses smaller buckets and a fused optimizer.

    Raises:
        ValueError: If a value is out of range.
    """

    stage: int
    world_size: int = 1
    precision: Precision = "32-true"
    offload: bool = False
    batch_size: int = 32
    seq_length: int = 128
    accumulation: int = 1
    method_bytes: int = 0
    estimation_batch_size: int = 0
    replay_ratio: float = 0.0
    memory_size: int = 0
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
        if self.offload and self.stage < 2:
            raise ValueError(f"offload needs stage 2 or 3, got stage {self.stage}")

    @property
    def examples(self) -> int:
        """Number of examples in a micro-batch, the replayed ones included."""
        return self.batch_size + round(self.batch_size * self.replay_ratio)

    @property
    def autocast(self) -> bool:
        """Whether autocast makes 16-bit copies of fp32 weights: in mixed precision without DeepSpeed."""
        return self.stage == 0 and self.precision.endswith("mixed")


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


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of the rank that holds most, in bytes.

    Args:
        weights: All parameters, or the rank's part of them.
        gradients: The gradients that are held until the step.
        optimizer: AdamW's two moments, the fp32 masters, and the masters that an earlier fit has left.
        methods: Tensors that methods keep for the weights, such as the importance and anchor of EWC.
        activations: What the forward pass of a micro-batch keeps for its backward pass.
        buffers: Everything else at the moment of peak use, see :func:`footprint`.
        total: Peak use of the device. Less than the sum of the above, which are not all held at the same time.
        host: What offloading keeps in the host's memory instead, and the order in which the replay memory is drawn.
        disk: Files of the replay memory on each node (not each rank): the current one and the one before it. They are
            mapped into memory, so that what is read of them is in the page cache once for all ranks of the node.
    """

    weights: int
    gradients: int
    optimizer: int
    methods: int
    activations: int
    buffers: int
    total: int
    host: int
    disk: int


@dataclass(frozen=True)
class Collective:
    """One kind of collective communication in an optimizer step.

    Args:
        operation: Name of the collective.
        size: Bytes of the whole buffer, the parts of all ranks together. May be the sum over several calls.
        times: How often a buffer of this size is communicated in a step.
        what: What is communicated, as in ``"gradients"``.
    """

    operation: Literal["all_reduce", "all_gather", "reduce_scatter"]
    size: int
    times: int
    what: str

    def sent(self, world_size: int, *, gloo: bool = False) -> float:
        """Bytes that each rank sends by the ring algorithm (Patarasuk & Yuan 2009); it receives the same number.

        An all-gather or a reduce-scatter sends ``(n - 1) / n`` of the buffer; an all-reduce consists of both. gloo has
        no reduce-scatter: there it costs as much as an all-reduce.

        Args:
            world_size: Number of ranks.
            gloo: Whether the ranks communicate over gloo.

        >>> Collective("all_reduce", 1000, 1, "gradients").sent(4), Collective("all_gather", 1000, 2, "weights").sent(4)
        (1500.0, 1500.0)
        """
        rounds = 2 if self.operation == "all_reduce" or (gloo and self.operation == "reduce_scatter") else 1
        return self.times * rounds * self.size * (world_size - 1) / world_size


def footprint(model: ModelShape, training: Training) -> Footprint:
    """Memory of the rank that needs most, under AdamW.

    Weights, gradients, masters and moments are those of Rajbhandari et al. (2020, "ZeRO: Memory optimizations toward
    training trillion parameter models", section 5), with DeepSpeed's own padding and remainders: ZeRO-1 and 2 cut each
    optimizer group, padded to a multiple of ``2 n`` elements, into ``n`` parts, and hold gradients of whole parameters
    where a part begins or ends inside a parameter; ZeRO-3 cuts each parameter into parts of ``ceil(size / n)``, and
    keeps the small ones whole as well. Methods hold fp32 numbers for each weight that the rank updates; EWC holds two.

    ``total`` is what is held all the time (weights, optimizer, methods) plus the largest of three moments:

    - the backward pass: gradients, activations, the buckets in which gradients are reduced (two if reduction and
      computation overlap, and one to reduce from), under DDP the buckets of all gradients, with autocast the 16-bit
      copies of the weights, under ZeRO-3 the weights that are gathered;
    - the step: gradients, an fp32 copy of the rank's part of a group, and on GPUs the temporary tensors of torch's
      ``foreach`` AdamW;
    - the consolidation of methods: their new tensors beside the old ones, one whole parameter, and the activations of
      one batch of the estimation.
    """
    held = _Held(model, training)
    buffers = held.buffers()
    peak = max(held.gradients + held.activations + buffers["backward"], held.gradients + buffers["step"])
    others = max(buffers["backward"], buffers["step"])
    if training.method_bytes:
        peak = max(peak, held.standing_gradients + buffers["consolidation"])
        others = max(others, buffers["consolidation"])
    # Offloading moves what it concerns from `on_device` to `host`, so that it is counted once.
    on_device = {"weights": held.weights, "optimizer": held.optimizer, "methods": held.methods}
    host = 8 * training.memory_size  # 8 bytes for each example: the order in which the memory is drawn
    if training.offload:
        host += on_device.pop("optimizer") + on_device.pop("methods") + held.offloaded_gradients
        if training.stage == 3:
            host += held.weights - held.persistent
            on_device["weights"] = held.persistent
    return Footprint(
        weights=on_device["weights"],
        gradients=held.gradients,
        optimizer=on_device.get("optimizer", 0),
        methods=on_device.get("methods", 0),
        activations=held.activations,
        buffers=others,
        total=sum(on_device.values()) + peak,
        host=host,
        disk=2 * training.memory_size * (8 * TOKEN_COLUMNS * training.seq_length + RECORD),
    )


def collectives(model: ModelShape, training: Training) -> list[Collective]:
    """What a rank communicates in an optimizer step.

    - DDP all-reduces the gradients once, whatever the accumulation.
    - ZeRO-1 and 2 all-reduce the gradients (DeepSpeed's default ``use_multi_rank_bucket_allreduce``, where the paper
      has a reduce-scatter), at stage 2 in each micro-batch, and gather the weights after the step.
    - ZeRO-3 gathers the weights in each forward and each backward pass (frozen ones in the forward pass only), and
      reduce-scatters the gradients in each micro-batch.

    Methods communicate at the end of an experience instead: see :func:`consolidation`. Losses, norms and checks take a
    few bytes and are left out, except for what ``Preemption`` adds.
    """
    width, n = widths(training.stage, training.precision), training.world_size
    moves: list[Collective] = []
    if n > 1 and training.stage == 0:
        moves = [Collective("all_reduce", width.gradient * model.trainable, 1, "gradients")]
    elif n > 1 and training.stage < 3:
        padded = sum(n * part for part in _parts(model.groups, n))
        times = training.accumulation if training.stage == 2 else 1
        moves = [
            Collective("all_reduce", width.gradient * model.trainable, times, "gradients"),
            Collective("all_gather", width.weight * padded, 1, "weights"),
        ]
    elif n > 1:
        trained, frozen = n * _pieces(_flat(model.groups), n), n * _pieces(model.frozen, n)
        moves = [
            Collective("all_gather", width.weight * (2 * trained + frozen), training.accumulation, "weights"),
            Collective("reduce_scatter", width.gradient * trained, training.accumulation, "gradients"),
        ]
    if n > 1 and training.preemption:
        moves.append(Collective("all_reduce", 1, training.accumulation, "preemption"))
    return moves


def consolidation(model: ModelShape, training: Training, *, n_classes: int, n_examples: int = 500) -> list[Collective]:
    """What is communicated once, at the end of an experience, to estimate the importance of the weights.

    If the weights are sharded, each backward pass of the estimation all-reduces the squared gradient of each weight in
    fp32. There is one pass for each class but one (above 32 classes a single pass) for each batch of ``n_examples``.
    ZeRO-3 also gathers the weights for each pass, forward and backward. DDP all-reduces the sum once.

    Args:
        model: Sizes of the model.
        training: How the model is trained.
        n_classes: Number of classes of the head.
        n_examples: Number of examples that the importance is estimated on, over all ranks.
    """
    n = training.world_size
    if n == 1 or not training.estimation_batch_size:
        return []
    if training.stage == 0:
        return [Collective("all_reduce", 4 * model.trainable, 1, "importance")]
    passes = max(n_classes - 1, 1) if n_classes <= 32 else 1
    times = passes * -(-n_examples // (training.estimation_batch_size * n))
    moves = [Collective("all_reduce", 4 * model.trainable, times, "importance")]
    if training.stage == 3:
        width = widths(3, training.precision).weight
        moves.append(Collective("all_gather", 2 * width * n * _pieces(_all(model), n), times, "weights"))
    return moves


def activations(model: ModelShape, training: Training, examples: int) -> int:
    """Bytes that autograd keeps from the forward pass of a micro-batch.

    Counted as in Korthikanti et al. (2023, "Reducing activation recomputation in large transformer models", section 4).
    In 16 bits with dropout, ``intermediate = 4 h`` and the attention's scores kept, a layer takes their
    ``s b h (34 + 5 a s / h)`` bytes; fused attention keeps one number for each head and token instead. Beyond the
    paper: gated layers, fewer heads for keys and values, RMSNorm (an fp32 copy and its output) and autocast (norms in
    fp32, a cast of each layer's input).

    Args:
        model: Sizes of the model.
        training: How the model is trained.
        examples: Number of examples in the micro-batch.
    """
    wide = 4 if training.precision == "32-true" else 2
    norm = 4 if training.autocast else wide
    if model.rms_norm:
        norm = 8 if training.autocast else 4 + wide
    inputs = (5 if model.gated else 4) if training.autocast else 2
    heads = 2 + 2 * model.kv_heads / model.heads
    inner = 4 if model.gated else 2
    features = 2 * norm + wide * (inputs + heads) + (2 if model.dropout else 0)
    per_token = features * model.hidden + inner * wide * model.intermediate
    pairs = (2 * wide + model.dropout) * training.seq_length if model.eager_attention else 4
    per_token += model.heads * pairs
    return round(model.layers * examples * training.seq_length * per_token)


class _Held:
    """The parts of a footprint, in bytes, for the rank that holds most."""

    def __init__(self, model: ModelShape, training: Training) -> None:
        self._model, self._training = model, training
        self._width = width = widths(training.stage, training.precision)
        n, stage = training.world_size, training.stage
        self.persistent = 0
        if stage == 0:
            self._parts = [sum(group) for group in model.groups]
            self.weights = width.weight * model.total
            self.gradients = width.gradient * model.trainable
        elif stage < 3:
            self._parts = _parts(model.groups, n)
            self.weights = width.weight * (n * sum(self._parts) + sum(model.frozen))
            self.gradients = width.gradient * (model.trainable if stage == 1 else _touched(model.groups, n))
        else:
            self._parts = [_pieces(group, n) for group in model.groups]
            self.persistent = width.weight * sum(size for size in _all(model) if size <= PERSISTENT)
            self.weights = width.weight * _pieces(_all(model), n) + self.persistent
            self.gradients = width.gradient * sum(self._parts)
        # The fp32 masters of the last fit are kept beside the new ones, so that no rounding adds up over updates.
        kept = 4 if training.later_fit and width.weight == 2 and stage > 0 else 0
        self.optimizer = (width.master + width.state + kept) * sum(self._parts)
        # Without the padding: methods hold tensors for weights only.
        owned = sum(min(part, sum(group)) for part, group in zip(self._parts, model.groups, strict=True))
        self.methods = training.method_bytes * owned
        self.activations = activations(model, training, training.examples)
        self.offloaded_gradients = (width.weight + 4) * sum(self._parts)
        if training.offload:  # they move to the host as the backward pass computes them
            self.gradients = 0
        self.standing_gradients = self.gradients if stage in (0, 3) else 0

    def buffers(self) -> dict[str, int]:
        """Temporary memory: in the backward pass, in the step, and while methods consolidate."""
        model, training, width = self._model, self._training, self._width
        stage, largest_part = training.stage, max(self._parts, default=0)
        size = GPU_BUCKET if training.gpu else CPU_BUCKET
        bucket, flat = width.gradient * size, width.gradient * min(size, model.trainable)
        temporary = largest_part if training.gpu and not training.offload else 0  # of the foreach optimizer
        if stage == 0:
            reducer = width.gradient * model.trainable if training.world_size > 1 else 0
            copies = 2 * model.total if training.autocast else 0
            return self._with_methods(
                reducer + copies, reducer + width.weight * model.trainable * training.gpu, reducer
            )
        copies = 4 * largest_part + (width.gradient * largest_part if width.gradient == 2 else 0)
        copies = 0 if training.offload else copies + 4 * temporary
        if stage < 3:
            backward = (2 if training.gpu else 1) * bucket + flat
            if stage == 2 and training.accumulation > 1 and not training.offload:
                backward += self.gradients  # of this micro-batch, beside the sum of those before
            backward += width.gradient * model.largest if training.offload else 0
            return self._with_methods(backward, copies, 0)
        gathered = width.weight * (2 * model.largest + min(PREFETCH, model.total))
        return self._with_methods(bucket + flat + gathered, bucket + copies, bucket + gathered)

    def _with_methods(self, backward: int, step: int, others: int) -> dict[str, int]:
        """Add what methods need: in the step a few chunks, at the end a copy of their state.

        The chunks are those of :class:`~evertune.shards.penalty.QuadraticPenalty`: a buffer, and the importance, the
        anchor and the weights of the rows that matter in a matrix where less than half of them do.
        """
        model, training = self._model, self._training
        if not training.method_bytes:
            return {"backward": backward, "step": step}
        fragment = -(-model.largest // (1 if training.stage == 0 else training.world_size))
        chunk = 4 * min(fragment, GPU_CHUNK if training.gpu else CPU_CHUNK)
        # Offloaded methods work in the host's memory.
        kept = 0 if training.offload else 4 * chunk
        new = 0 if training.offload else self.methods
        one = 4 * model.largest if training.stage > 0 else 0
        estimation = activations(model, training, training.estimation_batch_size)
        return {
            "backward": backward + kept,
            "step": step + kept,
            "consolidation": others + kept + new + one + estimation,
        }


def _parts(groups: Iterable[Iterable[int]], n: int) -> list[int]:
    """Elements of each group that one of ``n`` ranks updates under ZeRO-1 and 2, padded to a multiple of ``2 n``.

    >>> _parts([[10, 7], [3]], 4)
    [6, 2]
    """
    return [2 * -(-sum(group) // (2 * n)) for group in groups]


def _pieces(sizes: Iterable[int], n: int) -> int:
    """Elements that one of ``n`` ranks holds of parameters that are cut one by one, as under ZeRO-3.

    >>> _pieces([10, 7, 3], 4)
    6
    """
    return sum(-(-size // n) for size in sizes)


def _touched(groups: Iterable[Iterable[int]], n: int) -> int:
    """Elements of all parameters that lie in a rank's part or reach into it, for the rank with the most of them.

    >>> _touched([[10, 7], [3]], 4)  # parts of 6 and 2: the second rank's reaches into both parameters of 10 and 7
    20
    """
    per_rank = [0] * n
    for group, part in zip(groups := [list(group) for group in groups], _parts(groups, n), strict=True):
        start = 0
        for size in group:
            for rank in range(start // part, (start + size - 1) // part + 1) if size else ():
                per_rank[rank] += size
            start += size
    return max(per_rank)


def _flat(groups: Iterable[Iterable[int]]) -> list[int]:
    return [size for group in groups for size in group]


def _all(model: ModelShape) -> list[int]:
    return [*_flat(model.groups), *model.frozen]
