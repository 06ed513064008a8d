"""Random changes of the texts of training batches: tokens are left out, change places, or are hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.batch_change import BatchChange
from evertune.tasks.base import Change, task_of

_KINDS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
"""What a batch may have for each token of a text."""
_CHANGES: Mapping[str, Change] = {"deletion": "move", "swap": "move", "cutoff": "hide"}
_CHOICE, _DELETION, _SWAP, _PARTNER, _LENGTH, _START = range(6)
"""Numbers of the random sequences."""


class Augmentation(BatchChange):
    """Changes the texts of training batches at random: new, replayed and extra ones alike.

    - ``deletion`` and ``swap``: tokens are left out, or change places with one another (Wei & Zou 2019, "EDA: Easy Data
      Augmentation Techniques for Boosting Performance on Text Classification Tasks", who do so with words);
    - ``cutoff``: a span of consecutive tokens is hidden: each of them becomes the tokenizer's mask token, or its token
      for unknown words, or for padding if it has no other (Shen et al. 2020, "A Simple but Tough-to-Beat Data
      Augmentation Approach for Natural Language Understanding and Generation", whose span cutoff sets embeddings to 0).

    Special tokens and padding stay as they are, and the labels too. Swaps keep within a text of a pair; at least one
    token of a text is left.

    The memory of :class:`Replay` holds the unchanged texts, and so does whatever reads data outside of training steps:
    validation, tests, importance. Other callbacks see the unchanged batch in ``on_train_batch_start``.

    Stored answers are those to the unchanged texts, too: with :class:`DarkReplay`, :class:`Distillation` and
    ``TeacherDistillation``, the answers to changed texts are drawn towards them, as in consistency training (Xie
    et al. 2020, "Unsupervised Data Augmentation for Consistency Training"). DER++ itself replays in other augmentations
    than it stored logits for (Buzzega et al. 2020).

    What happens to a text depends only on the seed, the epoch and its tokens: it is the same on any number of ranks, at
    any batch size and after a resume, and another one in each epoch. It costs a few operations on tensors of the size
    of ``input_ids``, on the device.

    Args:
        deletion: Probability with which a token is left out. Default: 0.1, as in the paper.
        swap: Probability with which a token takes part in a random exchange of places. Default: 0.1.
        cutoff: Share of the tokens of a text that are hidden, as one span. Default: 0.
        share: Share of the examples that are changed; the others are learned as they are. Default: 0.5.
        seed: Seed of all that is random. Default: 0.

    Raises:
        ValueError: If a share is out of range, or nothing is to be changed. In ``setup``, if there is a second
            ``Augmentation``, the module has no tokenizer, the tokenizer has no token that hides others, or a change
            would make the labels of the module's task wrong: where they belong to tokens, as those of entities and of
            causal language models do, tokens can be hidden, but neither left out nor moved. On the first batch, if it
            has no tokens.

    Example::

        callbacks = [Replay(memory_size=600), Augmentation(deletion=0.1, swap=0.1)]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    keeps_nothing = True

    def __init__(
        self, deletion: float = 0.1, swap: float = 0.1, cutoff: float = 0.0, share: float = 0.5, seed: int = 0
    ) -> None:
        for name, value in (("deletion", deletion), ("swap", swap), ("cutoff", cutoff)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if not (deletion or swap or cutoff):
            raise ValueError("deletion, swap and cutoff are all 0, so nothing would be changed: leave Augmentation out")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.deletion, self.swap, self.cutoff, self.share, self.seed = deletion, swap, cutoff, share, seed
        self._tokens: SpecialTokens | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if any(isinstance(one, Augmentation) and one is not self for one in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("two Augmentation callbacks in one Trainer; use one, which makes all changes")
        task, kind = task_of(pl_module), type(pl_module).__name__
        for name, change in _CHANGES.items():
            if getattr(self, name) and change not in task.tolerates:
                hiding = "; cutoff= is possible" if "hide" in task.tolerates and change != "hide" else ""
                raise ValueError(
                    f"Augmentation({name}={getattr(self, name)}) would make the labels of {kind} wrong, which belong "
                    f"to tokens at their places: set {name}=0{hiding}"
                )
        tokenizer = getattr(pl_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"Augmentation needs the special tokens of module.tokenizer, which {kind} lacks")
        self._tokens = SpecialTokens.of(tokenizer)
        if self.cutoff and self._tokens.hidden is None:
            raise ValueError(
                "Augmentation(cutoff=...) hides tokens behind another one, and the tokenizer has none for a mask, "
                "unknown words or padding: set tokenizer.pad_token, or cutoff=0"
            )

    def change(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Change the texts of a batch, in its place."""
        ids = batch.get("input_ids") if hasattr(batch, "get") else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not isinstance(batch.get("attention_mask"), Tensor):
            raise ValueError(
                "Augmentation changes batches with the tokens of one text in a row, input_ids and attention_mask "
                f"[batch, tokens]; got a {type(batch).__name__}: leave Augmentation out, or collate to such a batch"
            )
        assert self._tokens is not None
        tokens = {name: batch[name] for name in _KINDS if name in batch and batch[name].shape == ids.shape}
        key = np.random.SeedSequence([self.seed, trainer.current_epoch]).generate_state(1, np.uint64).view(np.int64)
        draws = Draws(ids, tokens["attention_mask"], int(key[0]))
        free = self._tokens.others(ids, tokens["attention_mask"]) & (draws.of_examples(_CHOICE) < self.share)[:, None]
        if self.cutoff:
            assert self._tokens.hidden is not None
            hidden = span(free, self.cutoff, draws)
            tokens["input_ids"] = tokens["input_ids"].masked_fill(hidden, self._tokens.hidden)
        if self.swap:
            tokens["input_ids"] = swapped(tokens["input_ids"], free, self.swap, draws)
        if self.deletion:
            tokens = without(tokens, deleted(free, self.deletion, draws), self._tokens)
        for name, value in tokens.items():
            batch[name] = value


class SpecialTokens(NamedTuple):
    """The tokens of a tokenizer that are no part of a text.

    Args:
        ids: Numbers of those that stay as they are.
        hidden: Number of the token that hides others; None if there is none.
        padding: Number of the token that pads.
        left: Whether padding is on the left.
    """

    ids: list[int]
    hidden: int | None
    padding: int
    left: bool

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Those of a tokenizer. An unknown word is part of a text."""
        added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        kept = {*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
        hidden = next((token for token in known if token is not None), None)
        return cls(sorted(kept), hidden, padding or 0, tokenizer.padding_side == "left")

    def others(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Which tokens are part of a text, bool ``[batch, tokens]``."""
        return mask.bool() & ~torch.isin(ids, torch.tensor(self.ids, dtype=ids.dtype, device=ids.device))


class Draws:
    """Random numbers in [0, 1) for the examples and tokens of a batch, which depend only on a key and on the example.

    They are hashes (SplitMix64, Steele et al. 2014) of the tokens of an example, without its padding.

    Args:
        ids: Tokens ``[batch, tokens]``.
        mask: 1 for a token and 0 for padding.
        key: Number that seeds all of them.
    """

    def __init__(self, ids: Tensor, mask: Tensor, key: int) -> None:
        self._places = mask.long().cumsum(1)
        each = _mixed(ids.long() + _mixed(self._places + key))
        self._examples = _mixed((each * mask.long()).sum(1))

    def of_examples(self, number: int) -> Tensor:
        """Sequence ``number``: float32 ``[batch]``."""
        return _uniform(_mixed(self._examples + number))

    def of_tokens(self, number: int) -> Tensor:
        """Sequence ``number``: float32 ``[batch, tokens]``."""
        return _uniform(_mixed(_mixed(self._examples + number)[:, None] + self._places))


def deleted(free: Tensor, probability: float, draws: Draws) -> Tensor:
    """Which tokens are left out, bool ``[batch, tokens]``; of those that are ``free``, one at least is kept."""
    chances = draws.of_tokens(_DELETION)
    gone = free & (chances < probability)
    none_left = ~(free & ~gone).any(1, keepdim=True)
    return gone & ~(none_left & (chances == chances.masked_fill(~free, -1).amax(1, keepdim=True)))


def without(tokens: Mapping[str, Tensor], gone: Tensor, special: SpecialTokens) -> dict[str, Tensor]:
    """The kinds of tokens ``[batch, tokens]`` without some; the others move together, and padding takes the room."""
    kept = tokens["attention_mask"].bool() & ~gone
    order = torch.argsort(kept == (not special.left), dim=1, stable=True, descending=True)
    kept = kept.gather(1, order)
    fills = {"input_ids": special.padding}
    return {name: values.gather(1, order).masked_fill(~kept, fills.get(name, 0)) for name, values in tokens.items()}


def swapped(ids: Tensor, free: Tensor, probability: float, draws: Draws) -> Tensor:
    """The tokens ``[batch, tokens]``, of which some ``free`` ones have changed places within a text of a pair."""
    moving = free & (draws.of_tokens(_SWAP) < probability)
    # Tokens are sorted twice, by group and within it by place or at random: the n-th of one order goes to the place
    # of the n-th of the other. Each text between two special tokens is a group; what does not move is the last one.
    group = torch.where(moving, (~free).long().cumsum(1), ids.shape[1] + 1)
    chances = draws.of_tokens(_PARTNER).masked_fill(~moving, 0)
    places = torch.argsort(group, dim=1, stable=True)
    at_random = torch.argsort(group + chances.double(), dim=1, stable=True)
    return ids.scatter(1, places, ids.gather(1, at_random))


def span(free: Tensor, share: float, draws: Draws) -> Tensor:
    """Which tokens a span of a share of the ``free`` ones covers, bool ``[batch, tokens]``; one at least is left."""
    total = free.sum(1)
    length = (share * total + draws.of_examples(_LENGTH)).floor()  # the share on average
    length = torch.minimum(length, (total - 1).clamp(min=0))
    start = (draws.of_examples(_START) * (total - length + 1)).floor()[:, None]
    number = free.long().cumsum(1) - 1
    return free & (number >= start) & (number < start + length[:, None])


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64: int64 in, int64 out, whose bits all depend on all bits."""
    values = (values ^ _shifted(values, 30)) * -4658895280553007687
    values = (values ^ _shifted(values, 27)) * -7723592293110705685
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros, as of unsigned numbers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(values: Tensor) -> Tensor:
    """Numbers in [0, 1), from the upper 24 bits."""
    return _shifted(values, 40).float() / (1 << 24)
