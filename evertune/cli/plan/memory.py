"""What training holds on each rank, by formula: bytes of memory."""

from __future__ import annotations

from dataclasses import dataclass

from evertune.cli.plan.cuts import parts, pieces, rows_of, touched
from evertune.cli.plan.shape import ModelShape
from evertune.cli.plan.training import Training

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank (``stage3_param_persistence_threshold``)."""

PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead of their use (``stage3_prefetch_bucket_size``)."""

GPU_BUCKET, CPU_BUCKET = 200_000_000, 10_000_000
"""Elements of gradients that are reduced together: Lightning's default on a GPU, evertune's on a CPU."""

GPU_CHUNK, CPU_CHUNK = 1 << 24, 1 << 16
"""Elements of a weight that a penalty processes at a time."""

LOGIT_RECORD = 32
"""Numbers of an example beside its stored logits: those of its classes and rows, and where its values begin."""

TOKEN_COLUMNS, RECORD = 2, 250
"""Numbers that the replay memory keeps for each token (its id and its type), and further bytes for each example."""


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
        host: What offloading keeps in the host's memory instead, the order in which the replay memory is drawn, and
            the answers of the model before the update, for Distillation.
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
    stored = logit_bytes(model, training, training.stored_logits)
    # 8 bytes for each example: the order in which the memory is drawn.
    host = 8 * training.memory_size + training.n_taught * logit_bytes(model, training, training.taught_logits)
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
        disk=2 * training.memory_size * (8 * TOKEN_COLUMNS * training.seq_length + RECORD + stored),
    )


def logit_bytes(model: ModelShape, training: Training, kept: int) -> int:
    """Bytes of the stored logits of an example: of each row all, or those kept with their classes and the rest.

    Args:
        model: Sizes of the model.
        training: How the model is trained.
        kept: Number of logits of a row to keep, at most; 0 if none are stored.
    """
    if not kept:
        return 0
    rows = model.logit_rows or training.seq_length
    width = model.logit_width or training.seq_length
    row = 4 * width if kept >= width else 8 * kept + 4
    return LOGIT_RECORD + rows * row


def activations(model: ModelShape, training: Training, examples: int) -> int:
    """Bytes that autograd keeps from the forward pass of a micro-batch.

    Counted as in Korthikanti et al. (2023, "Reducing activation recomputation in large transformer models", section 4).
    In 16 bits with dropout, ``intermediate = 4 h`` and the attention's scores kept, a layer takes their
    ``s b h (34 + 5 a s / h)`` bytes; fused attention keeps one number for each head and token instead. Beyond the
    paper: gated layers, fewer heads for keys and values, RMSNorm (an fp32 copy and its output) and autocast (norms in
    fp32, a cast of each layer's input), a decoder's attention to its encoder, with targets as long as the texts, and
    the logits of every token, where all are of answers.

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
    attention = (wide * (1 + heads) + norm) * model.hidden + model.heads * pairs
    per_layer = model.layers * per_token + model.decoder_layers * (per_token + attention)
    # A softmax over the vocabulary is in fp32.
    return round(examples * (training.seq_length + model.virtual_tokens) * (per_layer + 4 * model.outputs))


class _Held:
    """The parts of a footprint, in bytes, for the rank that holds most."""

    def __init__(self, model: ModelShape, training: Training) -> None:
        self._model, self._training = model, training
        self._width = width = training.widths
        n, stage = training.world_size, training.stage
        self.persistent = 0
        if stage == 0:
            self._parts = [sum(group) for group in model.groups]
            self.weights = width.weight * model.total
            self.gradients = width.gradient * model.trainable
        elif training.fsdp2:
            *self._parts, frozen = (rows_of(*group, n) for group in model.rows_by_group())
            self.weights = width.weight * (sum(self._parts) + frozen)
            self.gradients = width.gradient * sum(self._parts)
        elif stage < 3:
            self._parts = parts(model.groups, n)
            self.weights = width.weight * (n * sum(self._parts) + sum(model.frozen))
            self.gradients = width.gradient * (model.trainable if stage == 1 else touched(model.groups, n))
        else:
            self._parts = [pieces(group, n) for group in model.groups]
            self.persistent = width.weight * sum(size for size in model.sizes if size <= PERSISTENT)
            self.weights = width.weight * pieces(model.sizes, n) + self.persistent
            self.gradients = width.gradient * sum(self._parts)
        # The fp32 masters of the last fit are kept beside the new ones, so that no rounding adds up over updates.
        kept = 4 if training.later_fit and width.weight == 2 and training.deepspeed else 0
        self.optimizer = (width.master + width.state + kept) * sum(self._parts)
        # Without the padding: methods hold tensors for weights only.
        owned = sum(min(part, sum(group)) for part, group in zip(self._parts, model.groups, strict=True))
        self.methods = training.method_bytes * owned + self._protected(owned)
        self.activations = activations(model, training, training.examples)
        self.offloaded_gradients = (width.weight + 4) * sum(self._parts)
        if training.offload:  # they move to the host as the backward pass computes them
            self.gradients = 0
        self.standing_gradients = self.gradients if stage in (0, 3) else 0

    def _protected(self, owned: int) -> int:
        """What OSFT keeps: where the rank's part of the matrices started, and its part of their directions."""
        model, training = self._model, self._training
        if not training.rank_ratio:
            return 0
        n = 1 if training.stage == 0 else training.world_size
        sizes = [rows * columns for rows, columns in model.protected]
        start = pieces(sizes, n) if training.stage in (0, 3) else min(owned, sum(sizes))
        share = start / max(sum(sizes), 1)
        directions = 0.0
        for rows, columns in model.protected:
            rank = int(training.rank_ratio * min(rows, columns))
            directions += rank * (rows * share + -(-columns // n))
        return round(4 * (start + directions))

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
        if training.fsdp2:
            return self._gathered(temporary)
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

    def _gathered(self, temporary: int) -> dict[str, int]:
        """Under FSDP2: what is outside of all blocks stays whole, and two blocks at a time are, in and behind use.

        Their gradients are whole until they are divided, from a copy in order.
        """
        model, training, width = self._model, self._training, self._width
        block, of_block = max(model.blocks, default=(0, 0))
        root, of_root = model.root
        whole = width.weight * (root + 2 * block) + (2 * (root + block) if training.autocast else 0)
        gradients = width.gradient * 2 * max(of_root, 2 * of_block)
        return self._with_methods(whole + gradients, width.weight * temporary, whole)

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
