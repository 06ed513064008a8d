"""How a module learns without forgetting: one method per file."""

from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.checkpoint import UpdateCheckpoint
from evertune.callbacks.drift_trigger import DriftTrigger
from evertune.callbacks.evaluation import ContinualEvaluation
from evertune.callbacks.ewc import EWC
from evertune.callbacks.heartbeat import Heartbeat
from evertune.callbacks.preemption import Preempted, Preemption
from evertune.callbacks.replay import Replay

__all__ = [
    "EWC",
    "ContinualCallback",
    "ContinualEvaluation",
    "DriftTrigger",
    "Heartbeat",
    "Preempted",
    "Preemption",
    "Replay",
    "UpdateCheckpoint",
]
