"""Featurisers, from a batch to one vector per example; they never learn, as learning would look like drift."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from evertune.drift.scripts import pieces_of
from evertune.tasks.texts import max_tokens, truncation_length
from evertune.utils.pretrained import load_model, load_tokenizer

Featuriser: TypeAlias = Callable[[Any], Any]
"""A callable from a batch to a float tensor ``[examples, n_features]``."""

_MIX = (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85)  # odd multipliers below 2**63


class HashedNgrams:
    """Counts of n-grams, hashed into a vector of unit length: no model, microseconds per text.

    The n-grams are of token numbers (the ``input_ids`` of a batch, without padding) or of words (a list of strings, or
    such a list under ``key``). Where a script has no spaces between words (Chinese, Japanese, Thai, ...), where words
    take many forms (Korean), and in runs of more than 16 characters, they are of characters instead. Each n-gram is
    added to or subtracted from one feature, so that collisions cancel on average (Weinberger et al. 2009).

    Example:
        >>> features = HashedNgrams(n_features=64)(["the cat sat", "the cat sat", "a dog ran away"])
        >>> features.shape, torch.equal(features[0], features[1]), torch.equal(features[0], features[2])
        (torch.Size([3, 64]), True, False)

    Args:
        n_features: Length of the vector. Default: 256.
        max_order: Length of the longest n-gram. The default of 2 counts single words (or characters) and pairs.
        key: Key of a mapping batch that holds the token numbers or strings.
        mask_key: Key of a mapping batch that holds the mask (0 for padding); without a mask every token counts.
        seed: Seed of the hash function.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If a batch holds neither token numbers nor strings.
    """

    def __init__(
        self,
        n_features: int = 256,
        max_order: int = 2,
        key: str = "input_ids",
        mask_key: str = "attention_mask",
        seed: int = 0,
    ) -> None:
        for name, value in (("n_features", n_features), ("max_order", max_order)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.n_features, self.max_order, self.key, self.mask_key, self.seed = n_features, max_order, key, mask_key, seed

    def __call__(self, batch: Any) -> Tensor:
        """One vector per example, ``[examples, n_features]``, on the batch's device."""
        ids, mask = self._tokens(batch)
        counts = torch.zeros(len(ids), self.n_features, device=ids.device)
        grams, whole = torch.zeros_like(ids) + self.seed, torch.ones_like(mask)
        for order in range(min(self.max_order, ids.shape[1])):
            end = ids.shape[1] - order
            # The hash of an n-gram is built from that of its prefix, one token at a time.
            grams = _mixed(grams[:, :end] * _MIX[0] + ids[:, order:] + order + 1)
            whole = whole[:, :end] & mask[:, order:]
            sign = ((grams >> 40) & 1) * 2 - 1
            # Bit 40 decides the sign and the low bits the feature: they must be independent for collisions to cancel.
            counts.scatter_add_(1, (grams & 0x7FFFFFFF) % self.n_features, (sign * whole).float())
        return nn.functional.normalize(counts)

    def _tokens(self, batch: Any) -> tuple[Tensor, Tensor]:
        value = batch.get(self.key) if isinstance(batch, Mapping) else batch
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            mask = batch.get(self.mask_key) if isinstance(batch, Mapping) else None
            return value.long(), torch.ones_like(value).bool() if mask is None else mask.bool()
        if isinstance(value, Sequence) and value and all(isinstance(text, str) for text in value):
            words = [[zlib.crc32(word.encode(errors="surrogatepass")) for word in pieces_of(text)] for text in value]
            rows = [torch.tensor(row, dtype=torch.long) for row in words]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            return ids, ids >= 0
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"HashedNgrams needs token numbers [examples, tokens] or strings under {self.key!r}, got a batch of "
            f"{found}; set key=, or pass another featuriser, a callable from a batch to a tensor [examples, n_features]"
        )


class FrozenEncoder:
    """The embedding of a text by a pretrained encoder, with its own copy of the weights, which is never trained.

    Example::

        featuriser = FrozenEncoder("FacebookAI/roberta-base", pooling="cls")
        trigger = DriftTrigger(featuriser=featuriser)

    Args:
        model_name_or_path: Hub name or folder that ``transformers.AutoModel`` can load.
        key: Key of a mapping batch that holds its strings, which the encoder's own tokenizer reads. A batch without it
            must hold ``input_ids`` (and ``attention_mask``) made by the same tokenizer.
        max_length: Longer texts are truncated to this many tokens. Default: 128, or what the encoder takes if that is
            less.
        pooling: ``"mean"`` of the tokens' embeddings without padding (which most sentence encoders are trained for), or
            ``"cls"``, the embedding of the first token, for encoders that are trained to represent the sentence there.
        normalize: Whether to scale each vector to length 1. Lengths are then ignored; most encoders express the meaning
            by the direction.

    Raises:
        ValueError: If ``pooling`` is neither, ``max_length`` is more than the encoder takes, the weights are a pickle,
            or the model asks for code that comes with it.
        TypeError: If a batch holds neither strings nor token numbers.
    """

    def __init__(
        self,
        model_name_or_path: str,
        key: str = "text",
        max_length: int | None = None,
        pooling: Literal["mean", "cls"] = "mean",
        normalize: bool = False,
    ) -> None:
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be mean or cls, got {pooling!r}")
        self.key, self.pooling, self.normalize = key, pooling, normalize
        with _whole_weights():
            self.model: Any = load_model(model_name_or_path).requires_grad_(False).eval()
        self.tokenizer: Any = load_tokenizer(model_name_or_path)
        self.max_tokens = max_tokens(self.model)
        self.max_length = truncation_length(max_length, self.tokenizer, self)

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """One vector per example, ``[examples, hidden_size]``."""
        texts = batch.get(self.key) if isinstance(batch, Mapping) else batch
        if isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts):
            batch = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError(
                f"FrozenEncoder needs strings (under {self.key!r} in a mapping) or a mapping with input_ids, "
                f"got a {type(batch).__name__}"
            )
        ids = batch["input_ids"][:, : self.max_length]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[:, : self.max_length]
        if self.model.device != ids.device:
            self.model.to(ids.device)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(pooled) if self.normalize else pooled


class SentenceEncoder(FrozenEncoder):
    """A sentence encoder as its authors use it: the mean of the tokens' embeddings, scaled to length 1.

    Example::

        trigger = DriftTrigger(featuriser=SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2"))

    Args:
        model_name_or_path: Hub name or folder that ``transformers.AutoModel`` can load.
        key: Key of a mapping batch that holds its strings; see :class:`FrozenEncoder`.
        max_length: Longer texts are truncated to this many tokens. Default: 128, or what the encoder takes if that is
            less.
    """

    def __init__(self, model_name_or_path: str, key: str = "text", max_length: int | None = None) -> None:
        super().__init__(model_name_or_path, key, max_length, pooling="mean", normalize=True)


def check_frozen(featuriser: Featuriser, module: nn.Module) -> None:
    """Refuse a featuriser that reads weights which ``module`` trains.

    Searches the featuriser itself, its attributes, the object that a method is bound to, the arguments of a partial,
    and the variables that a function refers to.

    Raises:
        ValueError: If it reads such a weight. The message names the first.
    """
    trained = {id(value): name for name, value in module.named_parameters() if value.requires_grad}
    for reached in _modules_of(featuriser, depth=3):
        for parameter in reached.parameters():
            if id(parameter) in trained:
                raise ValueError(
                    f"the featuriser reads weights that are being trained ({trained[id(parameter)]}): learning would "
                    "look like drift; give it a frozen copy (FrozenEncoder, copy.deepcopy), or use HashedNgrams"
                )


def _modules_of(thing: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth:
        referred: list[Any] = []
        if isinstance(thing, partial):
            referred = [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            referred = [thing.__self__]
        elif inspect.isfunction(thing):
            variables = inspect.getclosurevars(thing)
            referred = [*variables.nonlocals.values(), *variables.globals.values(), *(thing.__defaults__ or ())]
        elif isinstance(thing, list | tuple):
            referred = list(thing)
        elif not inspect.ismodule(thing) and not inspect.isclass(thing):
            referred = list(getattr(thing, "__dict__", {}).values())
        for value in referred:
            yield from _modules_of(value, depth - 1)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Load a model unsharded while another is being sharded: ZeRO-3 would also shard this one, and never gather it."""
    from transformers.integrations import deepspeed

    active = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = active


def _mixed(x: Tensor) -> Tensor:
    """Spread every bit of 64-bit numbers over all bits; multiplications wrap around."""
    # The masks make the shifts logical, as torch shifts signed numbers arithmetically.
    x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 29) & 0x7FFFFFFFF)
