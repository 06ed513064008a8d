"""Extractive question answering: a pretrained transformer that marks the answer in a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evertune.lightning_modules.heads import LinearHead
from evertune.lightning_modules.saving import gathered
from evertune.lightning_modules.transformer import TransformerModule
from evertune.metrics.answers import answer_f1, exact_match
from evertune.tasks.question_answering import QuestionAnsweringTask
from evertune.tasks.spans import Span, Window, best_span
from evertune.tasks.texts import truncation_length
from evertune.tasks.windows import targets_in, unstacked
from evertune.utils.evaluation import evaluation_mode

_OUTSIDE = -1e3  # the logit of a token that no answer can begin or end with; finite, so that differences are numbers


class SpanOutput(NamedTuple):
    """The output of a question answering module for a batch of windows.

    Args:
        logits: Logits [windows, 2, tokens] of each token as the first and as the last one of the answer. The first
            token of a window stands for "no answer here".
    """

    logits: Tensor


class QuestionAnsweringModule(TransformerModule):
    """A pretrained transformer that answers questions by a span of a context, or says that there is no answer in it.

    Two scores per token say where the answer begins and ends (Devlin et al. 2019). Long contexts are read in windows
    that overlap by ``stride`` tokens. Training takes the windows that hold the answer, and of each record one that does
    not; a prediction is the best span over all windows, or none. A question has its "no answer" from the first token of
    a window, so that answerable and unanswerable questions (SQuAD 2) need no switch.

    Batches, records and the score of a record are those of :class:`~evertune.tasks.QuestionAnsweringTask`. Logs
    ``train_loss``, ``val_loss``, ``val_exact_match``, ``val_f1``, ``test_loss``, ``test_exact_match`` and ``test_f1``.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
            Its tokenizer must be a fast one.
        stride: Number of context tokens that consecutive windows share. An answer of up to this length is always in one
            window as a whole. Default: 32, a quarter of the usual ``max_length``.
        max_answer_tokens: Longest answer, in tokens, that is considered. Default: 30.
        no_answer_threshold: Log-odds against "no answer" that an answer must exceed. Default: 0, the more probable of
            the two.
        **settings: Those of :class:`TransformerModule`, such as ``learning_rate``.

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values.

    Example::

        module = QuestionAnsweringModule("bert-base-uncased")
        stream = domain_incremental("questions.jsonl", text=("question", "context"), label="answers", task=module.task)
        ContinualTrainer(max_epochs=2, callbacks=[Replay(memory_size=500)]).fit_stream(module, stream)
        module.predict([("Where was she born?", "Ada was born in London in 1815.")])
        # [{"answer": "London", "start": 16, "end": 22, "probability": 0.93}]
    """

    head: Any
    """Module that maps each token to its two scores; None until ``configure_model``."""

    def __init__(
        self,
        model_name_or_path: str,
        *,
        stride: int = 32,
        max_answer_tokens: int = 30,
        no_answer_threshold: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(model_name_or_path, **settings)
        self.task = QuestionAnsweringTask(stride, max_answer_tokens, no_answer_threshold)
        self.head = None

    def configure_head(self) -> None:
        """Build the head, with a row for the first and one for the last token of an answer."""
        self.head = LinearHead(self.backbone.config.hidden_size, 2)

    def forward(self, **inputs: Any) -> SpanOutput:
        """Scores of the tokens of windows: ``module(input_ids=..., attention_mask=..., char_end=...)``.

        Without ``char_end``, which says which tokens are of the context, every token may be in an answer.
        """
        logits = self.head(self.encode(**inputs).last_hidden_state).float().transpose(1, 2)
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        possible = inputs.get("char_end", mask) > 0
        first = torch.arange(mask.shape[1], device=mask.device) == mask.argmax(1)[:, None]
        return SpanOutput(logits.masked_fill(~(possible | first)[:, None], _OUTSIDE))

    # --- steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean cross-entropy of first and last tokens, logged as ``train_loss``."""
        outputs = self.task.outputs(self, batch)
        loss = _loss(outputs.logits, outputs.targets)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss``, ``val_exact_match`` and ``val_f1`` over all ranks."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``, ``test_exact_match`` and ``test_f1`` over all ranks."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        tokens, rows = unstacked(batch)
        logits = self(**tokens).logits
        spans = self._spans(logits, tokens, rows)
        pairs = [
            (_answer(span, context)["answer"], label["text"])
            for span, context, label in zip(spans, batch["context"], batch["answers"], strict=True)
        ]
        values = {
            f"{stage}_loss": _loss(logits, targets_in(tokens)),
            f"{stage}_exact_match": torch.tensor([exact_match(*pair) for pair in pairs], device=logits.device).mean(),
            f"{stage}_f1": torch.tensor([answer_f1(*pair) for pair in pairs], device=logits.device).mean(),
        }
        self.log_dict(values, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(pairs))

    # --- predictions

    def answers(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answer to each question of a batch, over all windows of its context; see :meth:`predict`."""
        tokens, rows = unstacked(batch)
        spans = self._spans(self(**tokens).logits, tokens, rows)
        return [_answer(span, context) for span, context in zip(spans, batch["context"], strict=True)]

    def _spans(self, logits: Tensor, tokens: Mapping[str, Tensor], rows: Tensor) -> list[Span]:
        """The best span of each example of a batch, in fp64 on the CPU, so that every machine decides alike."""
        scores = logits.detach().double().cpu().numpy()
        lengths = tokens["attention_mask"].sum(1).tolist()
        places = {kind: tokens[kind].cpu().numpy() for kind in ("char_start", "char_end")}
        of_example: list[list[Window]] = [[] for _ in range(int(rows.max()) + 1)]
        for window, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
            here = np.s_[window, :length]
            start, end = scores[window, :, :length]
            of_example[row].append(Window(start, end, places["char_start"][here], places["char_end"][here]))
        return [best_span(one, self.task.max_answer_tokens, self.task.no_answer_threshold) for one in of_example]

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The answer to each question, see :meth:`predict`."""
        return self.answers(batch)

    def predict(
        self, questions: Sequence[tuple[str, str]], batch_size: int = 32, max_length: int | None = None
    ) -> list[dict[str, Any]]:
        """The answer to each question, a span of its context.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            questions: Pairs of a question and its context.
            batch_size: Number of questions per forward pass. Default: 32.
            max_length: Maximum number of tokens of a window; pass that of training. None (default) for the default of
                training.

        Returns:
            For each question ``answer``, the text; ``start`` and ``end``, its place in the context in characters; and
            ``probability`` among all spans and "no answer". Where there is no answer in the context, the text is empty,
            the place is None, and the probability is that of "no answer".

        Raises:
            TypeError: If one of them is not a pair of texts.
            ValueError: If ``max_length`` is more than the model takes, a text is empty, or a question leaves no room
                for the context.
        """
        rows = [_record(pair, number) for number, pair in enumerate(questions)]
        if not rows:
            return []
        self.configure_model()
        length = truncation_length(max_length, self.tokenizer, self)
        columns = ("question", "context")
        data: Any = self.task.dataset(rows, self.tokenizer, text=columns, label=None, id_column=None, max_length=length)
        collate, found = self.task.collator(self.tokenizer), list[dict[str, Any]]()
        with evaluation_mode(self), gathered(self), torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                batch = collate([data[place] for place in range(start, min(start + batch_size, len(rows)))])
                found += self.answers(self.transfer_batch_to_device(batch, self.device, 0))
        return found


def _loss(logits: Tensor, targets: Any) -> Tensor:
    """The mean cross-entropy of the first and the last tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _answer(span: Span, context: str) -> dict[str, Any]:
    text = "" if span.start is None else context[span.start : span.end]
    return {"answer": text, "start": span.start, "end": span.end, "probability": span.probability}


def _record(pair: Any, number: int) -> dict[str, str]:
    parts = list(pair) if isinstance(pair, list | tuple) else []
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"questions[{number}] must be a pair (question, context) of texts, got {pair!r:.80}")
    for part, name in zip(parts, ("question", "context"), strict=True):
        if not part.strip():
            raise ValueError(f"questions[{number}] has an empty {name}")
    return {"question": parts[0], "context": parts[1]}
