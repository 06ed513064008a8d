"""What was kept and what was lost: functions of the accuracy matrix, torchmetrics classes over them, the history."""

from evertune.metrics.functional import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_first_minus_last,
    forward_transfer,
    intransigence,
    negative_flip_rate,
)
from evertune.metrics.history import History, load_history, save_history
from evertune.metrics.modules import (
    AccuracyMatrix,
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForgettingFirstMinusLast,
    ForwardTransfer,
    Intransigence,
    NegativeFlipRate,
)

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForgettingFirstMinusLast",
    "ForwardTransfer",
    "History",
    "Intransigence",
    "NegativeFlipRate",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_first_minus_last",
    "forward_transfer",
    "intransigence",
    "load_history",
    "negative_flip_rate",
    "save_history",
]
