"""Streams of Avalanche as streams of evertune."""

from __future__ import annotations

from typing import Any

from evertune.streams.experience import Experience, ExperienceStream
from evertune.utils.examples import Examples


def from_avalanche(benchmark: Any) -> ExperienceStream:
    """The experiences of a benchmark of Avalanche, for ``ContinualTrainer.fit_stream``.

    Avalanche itself is not imported, and data are read where they are, not copied. Training data pass through the
    transformations for training, the others through those for evaluation. Examples are tuples of input and target:
    the number of the task, which Avalanche puts behind them, is left out.

    Args:
        benchmark: Object with a ``train_stream`` and a ``test_stream`` of as many experiences; a ``valid_stream``, if
            it has one, becomes the data for validation. Each experience has a ``dataset`` and, where classes are known,
            ``classes_in_this_experience``.

    Returns:
        The stream. Its experiences are called ``experience 1``, ``experience 2`` and so on, their classes by their
        numbers.

    Raises:
        ValueError: If a stream is missing, or has a different number of experiences than ``train_stream``.

    Example:
        >>> from types import SimpleNamespace as Object
        >>> train, test = ([(float(i), i % 2, 0) for i in range(n)] for n in (8, 4))
        >>> learned, scored = (Object(dataset=data, classes_in_this_experience={0, 1}) for data in (train, test))
        >>> stream = from_avalanche(Object(train_stream=[learned], test_stream=[scored]))
        >>> stream[0], stream[0].train[3]
        (Experience(experience 1: 8 train, 0 val, 4 test, 2 classes), (3.0, 1))
    """
    train = list(_stream(benchmark, "train_stream"))
    test = list(_stream(benchmark, "test_stream"))
    val = list(getattr(benchmark, "valid_stream", ()))
    for name, stream in {"test": test, "validation": val}.items():
        if len(stream) != len(train) and (stream or name == "test"):
            raise ValueError(
                f"the {name} stream has {len(stream)} experiences and the train stream {len(train)}: each experience "
                "is scored on data of its own; split the test data as the training data are split"
            )
    experiences = [
        Experience(
            f"experience {number + 1}",
            train=_Pairs(one.dataset, "train"),
            val=_Pairs(val[number].dataset, "eval") if val else None,
            test=_Pairs(test[number].dataset, "eval"),
            classes=[str(name) for name in sorted(getattr(one, "classes_in_this_experience", None) or ())],
        )
        for number, one in enumerate(train)
    ]
    return ExperienceStream(experiences, text=None)


def _stream(benchmark: Any, name: str) -> Any:
    if not hasattr(benchmark, name):
        raise ValueError(f"{type(benchmark).__name__} has no {name}; pass a benchmark of Avalanche")
    return getattr(benchmark, name)


class _Pairs:
    """Input and target of the examples of a dataset of Avalanche.

    Args:
        dataset: The dataset.
        group: The group of its transformations: ``"train"`` or ``"eval"``.
    """

    def __init__(self, dataset: Any, group: str) -> None:
        choose = getattr(dataset, group, None)
        self._dataset: Examples = dataset if choose is None else choose()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        example = self._dataset[index]
        return tuple(example[:2]) if isinstance(example, tuple | list) else example
