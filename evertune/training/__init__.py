"""Running updates: the trainer, the folder of a run, and its checkpoints."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.training.checkpoint import UpdateCheckpoint as UpdateCheckpoint
    from evertune.training.evaluation import ContinualEvaluation as ContinualEvaluation
    from evertune.training.fastest import Fastest as Fastest
    from evertune.training.heartbeat import Heartbeat as Heartbeat
    from evertune.training.preemption import Preempted as Preempted
    from evertune.training.preemption import Preemption as Preemption
    from evertune.training.trainer import ContinualTrainer as ContinualTrainer

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.training.checkpoint": "UpdateCheckpoint",
        "evertune.training.evaluation": "ContinualEvaluation",
        "evertune.training.fastest": "Fastest",
        "evertune.training.heartbeat": "Heartbeat",
        "evertune.training.preemption": "Preempted Preemption",
        "evertune.training.trainer": "ContinualTrainer",
    },
)
