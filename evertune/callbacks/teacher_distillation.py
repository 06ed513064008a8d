"""Distillation from another model: a student learns the answers of its teacher beside the labels."""

from __future__ import annotations

from evertune._lightning import pl
from evertune.callbacks.distillation import Distillation
from evertune.callbacks.training_data import TrainingData


class TeacherDistillation(Distillation):
    """A student learns the labels, and what its teacher says about the same examples.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". The loss gets the term of :class:`Distillation`,
    with the logits of the teacher for those of the model before the update, and over all its classes. They are computed
    once, before the first step; then the teacher is released.

    Args:
        teacher: A module with its weights, whose logits stand for the same classes as the student's.
        strength: Factor of the term. Default: 1.
        temperature: Above 1, small probabilities count for more. Default: 2.
        top_k: Number of logits to store for each row, as :class:`Distillation` has it; for language models. Default:
            all.

    Raises:
        ValueError: As :class:`Distillation`.

    Example::

        student = student_of(teacher, layers=3)
        trainer = ContinualTrainer(max_epochs=6, callbacks=[TeacherDistillation(teacher)])
        trainer.fit_stream(student, stream)
    """

    takes_tokens = True

    def __init__(
        self,
        teacher: pl.LightningModule,
        strength: float = 1.0,
        temperature: float = 2.0,
        top_k: int | None = None,
    ) -> None:
        super().__init__(strength, temperature, top_k=top_k, known=range(len(getattr(teacher, "classes", ()))))
        self._teacher: pl.LightningModule | None = teacher

    @property
    def _has_answers(self) -> bool:
        return self._teacher is not None

    def _ask(self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainingData) -> None:
        assert self._teacher is not None
        super()._ask(trainer, self._teacher.to(module.device), data)
        self._teacher = None
