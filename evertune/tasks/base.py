"""The task of a module: one object that defines labels, scores, batches and records for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from evertune.sources.base import Row
from evertune.sources.values import label_value, text_value
from evertune.tasks.losses import negative_losses
from evertune.tasks.predicting import columns_of, predict_classes, predict_scores
from evertune.tasks.texts import TokenizedDataset, pad_collator
from evertune.tasks.token_cache import TokenCache
from evertune.utils.batches import NoLogitsError, has_targets, logits_in, name_of, output_of, targets_of

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl
    from evertune.gate.predictions import Predictions

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Change = Literal["rewrite", "move", "hide"]
"""What may happen to a training text: another of the same meaning takes its place; tokens are left out, or change
places; tokens are hidden where they are."""
IGNORED = -100
"""The target of a position that does not count, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Outputs:
    """A module's output for a batch, in the form that importance estimators and scores need.

    Args:
        logits: Logits ``[batch, ..., classes]``; one logit per binary label for ``"bernoulli"``, the means for
            ``"gaussian"``.
        targets: Class numbers ``[batch, ...]`` for ``"categorical"``, a tensor of the logits' shape otherwise; -100 at
            positions that do not count. None if the batch has no targets.
        likelihood: What the logits parametrise. An example's log-likelihood is the sum over its positions.
    """

    logits: Tensor
    targets: Tensor | None
    likelihood: Likelihood

    @classmethod
    def of(cls, logits: Tensor, targets: Any, likelihood: Likelihood | None = None) -> Outputs:
        """Infer the likelihood, if it is not given, from the shapes and the targets.

        Class numbers of shape ``[batch, ...]`` make it categorical. Targets of the logits' own shape (or one target per
        single logit) are binary labels if all are between 0 and 1 (for a single logit, exactly 0 or 1), and otherwise
        the numbers of a regression.

        Raises:
            ValueError: If the shapes do not match, or there are no targets and only they could determine what the
                logits are: for a single logit, and for logits at many positions, some of which may be padding.
        """
        if logits.ndim == 1:
            logits = logits.unsqueeze(-1)
        if not isinstance(targets, Tensor):
            if likelihood is None and (logits.ndim != 2 or logits.shape[-1] < 2):
                raise ValueError(
                    f"logits of shape {list(logits.shape)} need targets: they say which positions count, and whether a "
                    f"single logit is a yes-or-no or a number; got {type(targets).__name__}; pass targets=, a callable "
                    "batch -> tensor"
                )
            return cls(logits, None, likelihood or "categorical")
        single = logits.shape[-1] == 1 and targets.numel() == logits.numel()
        if likelihood != "categorical" and (single or targets.shape == logits.shape):
            targets = targets.reshape(logits.shape)
            return cls(logits, targets, likelihood or ("bernoulli" if _are_yes_or_no(targets) else "gaussian"))
        if likelihood in (None, "categorical") and targets.numel() == logits.shape[:-1].numel():
            return cls(logits, targets.reshape(logits.shape[:-1]), "categorical")
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not fit logits of shape {list(logits.shape)}: expected class "
            "numbers for all dimensions but the last one, or one target for each logit; pass logits= and targets="
        )

    @property
    def counts(self) -> Tensor:
        """Which targets count, bool: ``[batch, ...]`` if the likelihood is categorical, else of the logits' shape."""
        if self.targets is None:
            shape = self.logits.shape[:-1] if self.likelihood == "categorical" else self.logits.shape
            return torch.ones(shape, dtype=torch.bool, device=self.logits.device)
        return self.targets != IGNORED


class Task:
    """What evertune needs to know about a task. A LightningModule carries its own as ``module.task``.

    This base class is the task of any module without one: it finds logits and targets in the usual places
    (:mod:`evertune.utils.batches`). Its methods about records and texts are for tasks that learn from records; only the
    live path and ``ExperienceDataModule`` with a tokenizer call them.

    Args:
        likelihood: What the logits parametrise. By default inferred from the targets (:meth:`Outputs.of`). Pass
            ``"gaussian"`` for a regression whose targets may all be 0 or 1.

    Example:
        >>> Task().label({"x": torch.zeros(2), "label": "sport"}), Task().label((torch.zeros(2), 3))
        ('sport', '3')
    """

    fixed_classes = True
    """Whether a logit stands for the same class in every batch. False for logits over the tokens of a text."""

    needs_label = True
    """Whether a record needs a label; False if the texts themselves can be learned."""

    tolerates: frozenset[Change] = frozenset(get_args(Change))
    """What may happen to a training text without making its label wrong."""

    example: Any = "a text"
    """What the module's ``predict`` is tried with before it is served."""

    def __init__(self, likelihood: Likelihood | None = None) -> None:
        self.likelihood = likelihood

    # --- an example, as the dataset gives it to the collate function

    def label(self, example: Any) -> str | None:
        """The class of an example, used to balance memories and to stratify splits; None if it has none.

        By default its ``labels``, ``label``, ``targets`` or ``target``, or the last item of a tuple. Several labels
        together count as one class.
        """
        return name_of(targets_of(example)) if has_targets(example) else None

    # --- a batch on the module's device

    def outputs(self, module: pl.LightningModule, batch: Any) -> Outputs:
        """Logits and targets of a batch, of any leading shape.

        The outputs of transformers' causal language models are shifted, so that each position is scored on the next
        token. Other logits belong to the target at their own position.

        Raises:
            TypeError: If no logits can be found.
            ValueError: If logits and targets do not match.
        """
        output = output_of(module, batch)
        logits = logits_in(output, module)
        targets = targets_of(batch) if has_targets(batch) else None
        name = type(output).__name__
        if isinstance(targets, Tensor) and "CausalLM" in name and "Output" in name:
            logits, targets = logits[:, :-1], targets[:, 1:]
        return Outputs.of(logits, targets, self.likelihood)

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """The score of each example, higher is better: float ``[batch]``.

        The share of an example's positions that are correct (:func:`accuracies`); for a regression, its negative
        squared error; without logits or targets to compare them with, its negative training loss
        (:func:`~evertune.tasks.losses.negative_losses`). NaN for an example without positions that count.

        Raises:
            TypeError: If neither logits with targets nor a loss can be found.
            ValueError: If logits and targets do not match.
        """
        try:
            outputs = self.outputs(module, batch) if has_targets(batch) else None
        except NoLogitsError as error:
            return negative_losses(module, batch, error)
        return accuracies(outputs) if outputs is not None else negative_losses(module, batch)

    # --- texts

    def texts(self, rows: Sequence[Row], text: str | Sequence[str], tokenizer: Any, max_length: int) -> list[list[str]]:
        """The texts of records as the tokenizer gets them: one list, or two for pairs. By default, as they are.

        Args:
            rows: Records of the journal: ``record`` with the fields.
            text: Field with the text, or the two fields of a pair.
            tokenizer: Tokenizer of the module.
            max_length: Maximum number of tokens, after which the tokenizer truncates a text.
        """
        return columns_of(rows, text)

    def dataset(
        self,
        data: Any,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
    ) -> Dataset[dict[str, Any]]:
        """The examples of a split, tokenised once; labels are kept as they are."""
        return TokenizedDataset(
            data, tokenizer, text=text, label=label, id_column=id_column, max_length=max_length, cache=cache
        )

    def training_dataset(self, data: Any, tokenizer: Any, **settings: Any) -> Dataset[dict[str, Any]]:
        """The examples to train on; by default, those of :meth:`dataset`, of which there is one for each record.

        A task whose records are too long for the model divides them into several examples here. ``settings`` are those
        of :meth:`dataset`.
        """
        return self.dataset(data, tokenizer, **settings)

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        """The function that collates tokenised examples into a batch."""
        return pad_collator(tokenizer)

    # --- records

    def check_text(self, value: Any) -> str:
        """The text of a record as it is stored. By default, a text that is not empty.

        Raises:
            ValueError: If this task cannot learn from the text, with the reason.
        """
        return text_value(value)

    def check_record(self, texts: Sequence[str], label: Any) -> None:
        """Check that a record's label fits its text, after each of them has been checked. By default, any does.

        Args:
            texts: The text, or the two texts of a pair, as returned by :meth:`check_text`.
            label: The label, as returned by :meth:`check_label`.

        Raises:
            ValueError: If the label does not fit, with the reason.
        """

    @property
    def fields(self) -> Mapping[str, Callable[[Any], Any]]:
        """Further fields of a record that the task reads, each with a function that checks its value.

        The function returns the value as it is stored, or raises ValueError with the reason. By default there are none.
        """
        return {}

    def check_fields(self, texts: Sequence[str], label: Any, fields: Mapping[str, Any]) -> None:
        """Check that the further :attr:`fields` of a record fit its text and its label. By default, any do.

        Args:
            texts: The text, or the two texts of a pair, as returned by :meth:`check_text`.
            label: The label, as returned by :meth:`check_label`; None for a record without one.
            fields: The checked value of each field.

        Raises:
            ValueError: If a value does not fit, with the reason.
        """

    def check_label(self, value: Any) -> Any:
        """The label of a record as it is stored: a JSON value. By default a name or a list of names.

        A task whose labels are not classes, such as a regression, overrides this method, :meth:`label` and
        :meth:`score`.

        Raises:
            ValueError: If this task cannot learn the label, with the reason.

        Example:
            >>> Task().check_label(3), Task().check_label(["sport", "law"])
            ('3', ['sport', 'law'])
        """
        return label_value(value)

    def label_names(self, value: Any) -> list[str]:
        """The names of the classes in a record's label, by which a head grows and which label drift counts.

        By default, a string is a name, a list of strings are names, and anything else has no names; checks that need
        classes then do not apply.

        Example:
            >>> Task().label_names("sport"), Task().label_names(0.5)
            (['sport'], [])
        """
        names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        return [name for name in names if isinstance(name, str)]

    def predict(
        self,
        module: Any,
        rows: Sequence[Row],
        *,
        text: str | Sequence[str],
        label: str | None,
        batch_size: int,
        max_length: int,
    ) -> Predictions:
        """The module's predictions for records, in their order.

        By default, a module with ``classes`` (names in the order of its logits) predicts the most probable class of
        each record (with ``multi_label``, all classes above one half) and its probability. Any other module yields the
        :meth:`score` of each record, which must be in [0, 1].

        Called in evaluation mode, without gradients, with all weights gathered.

        Args:
            module: Module with a ``tokenizer``.
            rows: Records of the journal: ``id`` and ``record``, its fields.
            text: Field with the text, or the two fields of a pair.
            label: Field with the label, in the form returned by :meth:`check_label`; None if the task needs none.
            batch_size: Records per forward pass.
            max_length: Maximum number of tokens; longer texts are truncated.

        Raises:
            ValueError: If a score is not in [0, 1].
        """
        assert label is not None, "a task that needs no label predicts for itself"
        if getattr(module, "classes", None):
            columns = self.texts(rows, text, module.tokenizer, max_length)
            return predict_classes(module, rows, columns, label, batch_size, max_length)
        return predict_scores(self, module, rows, text, label, batch_size, max_length)


def task_of(module: Any) -> Task:
    """The task that a module carries, or the default one."""
    task = getattr(module, "task", None)
    return task if isinstance(task, Task) else Task()


def accuracies(outputs: Outputs) -> Tensor:
    """The share of correct positions of each example, among those that count: float32 ``[batch]``.

    A class is correct if its logit is the largest. The binary labels of one position (the last dimension) are correct
    only if all of them are (a logit above 0 means yes). For a regression, the negative mean squared error. NaN for an
    example without positions that count.

    Raises:
        ValueError: If there are no targets.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> accuracies(Outputs(logits, torch.tensor([[0, 0, -100]]), "categorical"))
        tensor([0.5000])
    """
    logits, targets, counts = outputs.logits, outputs.targets, outputs.counts
    if targets is None:
        raise ValueError(f"logits of shape {list(logits.shape)} cannot be scored without targets")
    if outputs.likelihood == "categorical":
        scores = logits.argmax(-1) == targets
    elif outputs.likelihood == "bernoulli":
        scores = (((logits > 0) == (targets > 0.5)) | ~counts).all(-1)
        counts = counts.any(-1)
    else:
        scores = -(logits.float() - targets).square()
    flat = torch.where(counts, scores.float(), 0).reshape(len(logits), -1).sum(1)
    return flat / counts.reshape(len(logits), -1).sum(1)


def losses(outputs: Outputs) -> Tensor:
    """The loss of each example, a mean over its positions that count: float32 ``[batch]``.

    Cross-entropy, the mean binary cross-entropy of binary labels, or the squared error of a regression. NaN for an
    example without positions that count.

    Raises:
        ValueError: If there are no targets.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> losses(Outputs(logits, torch.tensor([[0, 1, -100]]), "categorical"))
        tensor([0.3133])
    """
    logits, targets, counts = outputs.logits.float(), outputs.targets, outputs.counts
    if targets is None:
        raise ValueError(f"logits of shape {list(logits.shape)} have no loss without targets")
    if outputs.likelihood == "categorical":
        each = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", ignore_index=IGNORED)
    elif outputs.likelihood == "bernoulli":
        each = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    else:
        each = (logits - targets).square()
    flat = torch.where(counts, each, 0.0).reshape(len(logits), -1).sum(1)
    return flat / counts.reshape(len(logits), -1).sum(1)


def _are_yes_or_no(targets: Tensor) -> bool:
    values = targets[targets != IGNORED]
    if targets.shape[-1] == 1:
        return bool(((values == 0) | (values == 1)).all())
    return bool(((values >= 0) & (values <= 1)).all())
