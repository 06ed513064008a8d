"""The task of a module: the one object that everything else asks about labels, scores, batches and records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl
    from evertune.gate.predictions import Predictions

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
IGNORED = -100
"""The target of a position that counts for nothing, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Outputs:
    """What a module says about a batch, as an importance estimator or a score needs it.

    Args:
        logits: ``[batch, ..., classes]``; for ``"bernoulli"`` one logit per yes-or-no, for ``"gaussian"`` the means.
        targets: ``[batch, ...]`` class numbers for ``"categorical"``, with -100 where a position counts for nothing;
            of the logits' shape for the others; None where the batch has none.
        likelihood: what the logits parametrise.
    """

    logits: Tensor
    targets: Tensor | None
    likelihood: Likelihood


class Task:
    """What evertune must know of a task. A LightningModule carries its own as ``module.task``.

    This base class is the task of any module that carries none: it finds logits and targets in the usual places
    (:mod:`evertune.utils.batches`). Its methods about records and texts are those of a task that learns from records;
    only the live path and ``ExperienceDataModule`` with a tokenizer call them.
    """

    # --- an example, as the dataset gives it to the collate function

    def label(self, example: Any) -> str | None:
        """The class of an example, by which memories balance and splits are stratified; None where it has none."""
        raise NotImplementedError

    # --- a batch on the module's device

    def outputs(self, module: pl.LightningModule, batch: Any) -> Outputs:
        """Logits and targets of a batch, of any leading shape.

        Raises:
            TypeError: when no logits can be found.
        """
        raise NotImplementedError

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """How well the module does on each example: a float tensor ``[batch]``, in [0, 1] where there are logits.

        Raises:
            TypeError: when neither logits with targets nor a loss can be found.
        """
        raise NotImplementedError

    # --- texts

    def dataset(
        self,
        data: Any,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
    ) -> Dataset[dict[str, Any]]:
        """The examples of a split, tokenised once."""
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        """What joins tokenised examples to a batch."""
        raise NotImplementedError

    # --- records

    def check_label(self, value: Any) -> Any:
        """The label of a record as it is kept (a JSON value).

        Raises:
            ValueError: when this task cannot learn it, with the reason.
        """
        raise NotImplementedError

    def label_names(self, value: Any) -> list[str]:
        """The names of the classes in a record's label: what a head grows by, and what label drift counts."""
        raise NotImplementedError

    def predict(
        self,
        module: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        text: str | Sequence[str],
        label: str,
        batch_size: int,
        max_length: int,
    ) -> Predictions:
        """What a module says about records, in their order."""
        raise NotImplementedError


def task_of(module: Any) -> Task:
    """The task that a module carries, or the default one."""
    task = getattr(module, "task", None)
    return task if isinstance(task, Task) else Task()
