"""Text matching and recommendation: a pretrained encoder that ranks items for a query."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import rank_zero_warn
from evertune.lightning_modules.backbone import pool
from evertune.lightning_modules.heads import LinearHead
from evertune.lightning_modules.in_batch import in_batch_loss, keys_of, of_all_ranks
from evertune.lightning_modules.item_index import ItemIndex, checked_items, read_items
from evertune.lightning_modules.saving import gathered
from evertune.lightning_modules.transformer import TransformerModule
from evertune.metrics.ranking import RankingScores, ranking_scores
from evertune.tasks.base import losses
from evertune.tasks.parts import parts_at
from evertune.tasks.text_matching import Architecture, MatchingLoss, TextMatchingTask
from evertune.tasks.texts import padded_tokens, truncation_length
from evertune.utils.evaluation import evaluation_mode

_ABSENT = -1e4  # the logit of a candidate that a record lacks; finite, so that differences are numbers


class MatchingOutput(NamedTuple):
    """The output of a text matching module for a batch of texts, or of pairs of texts.

    Args:
        logits: Of two towers, the unit vectors of the texts [texts, features]; of a cross-encoder, the scores of the
            pairs [pairs, 1].
        features: The pooled texts or pairs [texts, features].
    """

    logits: Tensor
    features: Tensor


class TextMatchingModule(TransformerModule):
    """A pretrained encoder that ranks items for a query: search, matching of texts, and recommendation.

    - ``two_tower`` reads query and items apart and compares their vectors by cosine, so that a query is compared with
      all items at once. One encoder reads both, and takes the mean over the tokens (Reimers & Gurevych 2019). The loss
      is the cross-entropy of each positive among the items of all queries of a step, over all ranks (InfoNCE, van den
      Oord et al. 2018), and the negatives that the records bring. Copies of a query's positive are not its negatives.
    - ``cross_encoder`` reads each pair of query and item together and gives it a score: better, and far slower, for
      the few candidates that another model has found. The loss is over the candidates of each record.

    Batches, records and the score of a record are those of :class:`~evertune.tasks.TextMatchingTask`. Replayed examples
    join a step like new ones. Logs ``train_loss``, and ``loss``, ``mrr``, ``ndcg`` and ``recall_at_1`` over the
    candidates of each record, with ``val_`` and ``test_`` in front.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        architecture: ``two_tower`` (default) or ``cross_encoder``.
        loss: Of a cross-encoder, ``listwise`` (default), a softmax over the candidates of a record, or ``binary``, a
            yes or no for each.
        temperature: Of two towers, divisor of the cosines in the loss. Default: 0.05 (Gao et al. 2021, SimCSE).
        negatives: Field with a record's own negatives. Default: None, no such field.
        n_negatives: Number of candidates beside the positive, given or else drawn. A cross-encoder learns from all of
            them, two towers from the given ones. Default: 7.
        items: File with the items to rank, read before each fit: ``.txt`` with a line for each, or records with the
            field ``text``. Default: None; see :meth:`set_items`.
        **settings: Those of :class:`TransformerModule`, such as ``learning_rate``.

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values.

    Example::

        module = TextMatchingModule("sentence-transformers/all-MiniLM-L6-v2", items="items.jsonl")
        columns = {"text": "query", "label": "positive", "task": module.task}
        stream = time_incremental("clicks.jsonl", date="day", period="week", **columns)
        ContinualTrainer(max_epochs=2, callbacks=[Replay(memory_size=500)]).fit_stream(module, stream)
        module.predict(["a lamp for the desk"], top=2)
        # [[{"item": "desk lamp, LED", "score": 0.81}, {"item": "clip-on lamp", "score": 0.72}]]
    """

    head: Any
    """Of a cross-encoder, the module that maps a pair to its score; None until ``configure_model``."""
    index: ItemIndex | None
    """The items with their vectors by the present weights; None until :meth:`refresh`, and after a fit has begun."""

    def __init__(
        self,
        model_name_or_path: str,
        *,
        architecture: Architecture = "two_tower",
        loss: MatchingLoss = "listwise",
        temperature: float = 0.05,
        negatives: str | None = None,
        n_negatives: int = 7,
        items: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model_name_or_path, **settings)
        self.task = TextMatchingTask(architecture, loss, negatives, n_negatives)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if loss != "listwise" and architecture == "two_tower":
            raise ValueError(
                f"loss={loss!r} is for a cross_encoder: leave it out, or set architecture to cross_encoder"
            )
        self.temperature = temperature
        self.items = items
        self.head = self.index = None
        self._catalogue: list[str] = []
        if items is not None:
            self.task.example = "a text"

    # --- the model

    def configure_model(self) -> None:
        """Load the transformer, and the items that were saved with it. Later calls have no effect."""
        if self.backbone is not None:
            return
        super().configure_model()
        index = None if self._saved is None else ItemIndex.load(self._saved)
        if index is None:
            return
        self.set_items(index.items)
        if index.fingerprint == self.fingerprint():
            self.index = index
        else:  # weights of another precision, or with new adapters
            rank_zero_warn(
                f"the vectors of the {len(index.items)} items in {self._saved} are of other weights: new ones are made"
            )

    def configure_head(self) -> None:
        """Build the head of a cross-encoder; two towers have none."""
        if self.task.in_pairs:
            self.head = LinearHead(self.backbone.config.hidden_size, 1)
            # A softmax over candidates does not depend on the bias, whose gradient would be rounding error.
            self.head.bias.requires_grad_(self.task.likelihood == "bernoulli")

    def forward(self, **inputs: Any) -> MatchingOutput:
        """Vectors of texts, or scores of pairs: ``module(input_ids=..., attention_mask=...)``."""
        hidden = self.encode(**inputs).last_hidden_state
        features = pool(hidden, inputs.get("attention_mask"), "mean")
        if self.task.in_pairs:
            return MatchingOutput(self.head(features).float(), features)
        return MatchingOutput(F.normalize(features.float(), dim=-1), features)

    def candidate_logits(self, batch: Mapping[str, Any], *, together: bool = True) -> tuple[Tensor, Tensor]:
        """The logits of the candidates of each example, the positive first: scores, or cosines over the temperature.

        Args:
            batch: A batch of the task.
            together: Whether to read all candidates in one forward pass (default), or one after another.

        Returns:
            The logits, fp32 ``[batch, 1 + n_negatives]``, -1e4 for a candidate that the record lacks; and whether it
            has each of them, bool of the same shape.
        """
        numbers = range(1, self.task.candidates.stop)
        read = [parts_at(batch, some) for some in ([numbers] if together else [[number] for number in numbers])]
        found = torch.cat([self(**parts.tokens).logits.unflatten(0, parts.present.shape) for parts in read], 1)
        present = torch.cat([parts.present for parts in read], 1)[:, self.task.candidates.start - 1 :]
        values = found if self.task.in_pairs else found[:, 1:] * found[:, :1] / self.temperature
        logits = values.sum(-1)  # of a cross-encoder, the only one
        return logits.masked_fill(~present, _ABSENT), present

    # --- steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch, logged as ``train_loss``."""
        loss = self._over_candidates(batch) if self.task.in_pairs else self._in_batch(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def _over_candidates(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss with the candidates of each record."""
        return losses(self.task.targets_for(*self.candidate_logits(batch))).mean()

    def _in_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss with the items of all queries of the step as negatives."""
        trainer = self._trainer
        asked = parts_at(batch, [1]).tokens
        parts = parts_at(batch, range(2, int(batch["parts"].max()) + 1))
        chosen = parts.given.flatten()
        tokens = {kind: values[chosen] for kind, values in parts.tokens.items()}
        n_each = parts.given.sum(1)
        own = n_each.cumsum(0) - n_each  # the positive is the first item of each
        query_keys = keys_of(asked)
        keys = torch.stack([keys_of(tokens), torch.zeros_like(tokens["input_ids"][:, 0])], 1)
        keys[own, 1] = query_keys
        queries = self(**asked).logits
        items, before = of_all_ranks(self(**tokens).logits, trainer)
        keys, _ = of_all_ranks(keys, trainer)
        return in_batch_loss(queries, items, own + before, query_keys, keys[:, 0], keys[:, 1], self.temperature)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss``, ``val_mrr``, ``val_ndcg`` and ``val_recall_at_1`` over all ranks."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``, ``test_mrr``, ``test_ndcg`` and ``test_recall_at_1`` over all ranks."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        outputs = self.task.targets_for(*self.candidate_logits(batch))
        logits = outputs.logits
        relevant = torch.zeros_like(logits, dtype=torch.bool)
        relevant[:, 0] = True
        first, everything = (ranking_scores(logits, relevant, k) for k in (1, logits.shape[1]))
        values = {
            f"{stage}_loss": losses(outputs).mean(),
            f"{stage}_mrr": everything.mrr.mean(),
            f"{stage}_ndcg": everything.ndcg.mean(),
            f"{stage}_recall_at_1": first.recall.mean(),
        }
        self.log_dict(values, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(logits))

    # --- items

    def on_fit_start(self) -> None:
        """Read the items, before a step is made. Their vectors are made again by the new weights."""
        if self.items is not None:
            self.set_items(read_items(self.items))
        self.index = None

    def set_items(self, items: Sequence[str]) -> None:
        """Replace the items that :meth:`predict` ranks. Their vectors are made when they are first needed.

        Raises:
            ValueError: If there are none, or one is not a text or is empty.
        """
        self._catalogue = checked_items(items)
        self.index = None
        self.task.example = "a text"

    def refresh(self, batch_size: int = 64) -> ItemIndex:
        """Make the index of the items by the present weights. After a ZeRO-3 fit, call it on every rank.

        Args:
            batch_size: Number of items per forward pass. Default: 64.

        Raises:
            ValueError: If there are no items.
        """
        if not self._catalogue and self.items is not None:
            self.set_items(read_items(self.items))
        if not self._catalogue:
            raise ValueError("there are no items to rank: name a file of them in items, or call set_items()")
        vectors = np.empty((len(self._catalogue), 0), np.float32)
        if not self.task.in_pairs:
            vectors = self.vectors(self._catalogue, batch_size)
        self.index = ItemIndex(self._catalogue, vectors, self.fingerprint())
        return self.index

    def use_index(self, index: ItemIndex) -> None:
        """Rank the items of an index. Call it on every rank.

        Raises:
            ValueError: If its vectors were made by other weights.
        """
        self.configure_model()
        if index.fingerprint != self.fingerprint():
            raise ValueError(
                f"the index of {len(index.items)} items was made by other weights than these, so that its vectors "
                "mean something else: make a new one with set_items() and refresh()"
            )
        self.set_items(index.items)
        self.index = index

    def fingerprint(self) -> str:
        """A hash of the weights. Call it on every rank."""
        with gathered(self):
            digest = hashlib.sha256()
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the module with the index of its items, see :meth:`TransformerModule.save_pretrained`."""
        if self.index is None and (self._catalogue or self.items is not None):
            self.refresh()
        super().save_pretrained(directory)

    def save_more(self, folder: Path) -> None:
        """Write the index, if there are items."""
        if self.index is not None:
            self.index.save(folder)

    # --- predictions

    def vectors(self, texts: Sequence[str], batch_size: int = 64, max_length: int | None = None) -> np.ndarray:
        """The unit vectors of texts by two towers, fp32 ``[texts, features]``."""
        return self._read(texts, batch_size, max_length)

    def scores(
        self, pairs: Sequence[tuple[str, str]], batch_size: int = 32, max_length: int | None = None
    ) -> np.ndarray:
        """The score of each pair of a query and an item, fp32 ``[pairs]``: the cosine, or the logit of a cross-encoder.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.
        """
        if self.task.in_pairs:
            return self._read(pairs, batch_size, max_length)[:, 0]
        queries, items = (self.vectors([pair[side] for pair in pairs], batch_size, max_length) for side in (0, 1))
        found: np.ndarray = (queries * items).sum(1)
        return found

    def rank(
        self,
        query: str,
        candidates: Sequence[str],
        batch_size: int = 32,
        max_length: int | None = None,
        top: int | None = None,
    ) -> list[dict[str, Any]]:
        """Candidates in the order of their scores, as :meth:`predict` returns them; for re-ranking by a cross-encoder.

        Args:
            query: The query.
            candidates: The items.
            batch_size: Number of texts or pairs per forward pass. Default: 32.
            max_length: Maximum number of tokens. None (default) for the default of training.
            top: Number of items to return. Default: all of them.
        """
        scores = self.scores([(query, item) for item in candidates], batch_size, max_length)
        best = np.argsort(-scores, kind="stable")[:top]
        return [{"item": candidates[place], "score": float(scores[place])} for place in best]

    def predict(
        self, queries: Sequence[Any], batch_size: int = 32, max_length: int | None = None, top: int = 10
    ) -> list[Any]:
        """The best items for each query; or for pairs of a query and an item, their score.

        Two towers search the index, a cross-encoder scores every item, so that it should have few. Loads the weights
        and makes the index if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            queries: Texts, or histories: lists of texts, the most recent last. Or pairs, as tuples.
            batch_size: Number of texts or pairs per forward pass. Default: 32.
            max_length: Maximum number of tokens; pass that of training. None (default) for the default of training.
            top: Number of items for each query. Default: 10.

        Returns:
            For each query a list of ``{"item": ..., "score": ...}``, best first; for each pair ``{"score": ...}``: the
            cosine, or the logit of a cross-encoder.

        Raises:
            TypeError: If some are pairs and others are not.
            ValueError: If there are no items, a query is empty, or ``max_length`` is more than the model takes.
        """
        asked: list[Any] = [_checked(query, number, self.task) for number, query in enumerate(queries)]
        if len({type(one) for one in asked}) > 1:
            raise TypeError("queries must all be texts and histories, or all be pairs of a query and an item")
        if not asked:
            return []
        if isinstance(asked[0], tuple):
            return [{"score": float(score)} for score in self.scores(asked, batch_size, max_length)]
        self.configure_model()
        index = self.index or self.refresh()
        if self.task.in_pairs:
            return [self.rank(query, index.items, batch_size, max_length, top) for query in asked]
        places, scores = index.search(self.vectors(asked, batch_size, max_length), top)
        return [
            [{"item": index.items[place], "score": float(score)} for place, score in zip(*row, strict=True)]
            for row in zip(places.tolist(), scores, strict=True)
        ]

    def ranking(
        self,
        queries: Sequence[Any],
        relevant: Sequence[Sequence[str]],
        k: int = 10,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> RankingScores:
        """How well two towers rank all items of the index: recall, NDCG, reciprocal rank and AUC of each query.

        Args:
            queries: Texts or histories.
            relevant: For each query the items that are right.
            k: Number of items that recall and NDCG look at. Default: 10.
            batch_size: Number of queries per forward pass. Default: 32.
            max_length: Maximum number of tokens, as in training.

        Raises:
            ValueError: If an item is not in the index, or it is a cross-encoder.
        """
        if self.task.in_pairs:
            raise ValueError("a cross_encoder re-ranks the few items that two towers find: use rank()")
        self.configure_model()
        index = self.index or self.refresh()
        places = {item: place for place, item in enumerate(index.items)}
        right = torch.zeros(len(queries), len(places), dtype=torch.bool)
        for row, items in enumerate(relevant):
            if missing := [item for item in items if item not in places]:
                raise ValueError(f"item {missing[0]!r:.80} of query {row} is not among the items: add it")
            right[row, [places[item] for item in items]] = True
        asked = [self.task.check_text(query) for query in queries]
        scores = self.vectors(asked, batch_size, max_length) @ index.vectors.T
        return ranking_scores(torch.from_numpy(scores), right, k)

    def _read(self, texts: Sequence[Any], batch_size: int, max_length: int | None) -> np.ndarray:
        """The logits of texts or pairs, [texts, ...] in fp32."""
        self.configure_model()
        length = truncation_length(max_length, self.tokenizer, self)
        found = []
        with evaluation_mode(self), gathered(self), torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                tokens = padded_tokens(self.tokenizer, texts[start : start + batch_size], length, first=start)
                found.append(self(**tokens.to(self.device)).logits.float().cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, 1), np.float32)


def _checked(query: Any, number: int, task: TextMatchingTask) -> str | tuple[str, str]:
    """A query as one text, or a pair of it and an item."""
    try:
        if isinstance(query, tuple) and len(query) == 2:
            return task.check_text(query[0]), task.check_label(query[1])
        return task.check_text(query)
    except ValueError as error:
        raise ValueError(f"queries[{number}]: {error}") from None
