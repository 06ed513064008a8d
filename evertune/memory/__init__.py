"""The replay memory and its selection policies."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.memory.memory import ReplayMemory as ReplayMemory
    from evertune.memory.policies import ClassBalanced as ClassBalanced
    from evertune.memory.policies import Herding as Herding
    from evertune.memory.policies import LossAware as LossAware
    from evertune.memory.policies import Policy as Policy
    from evertune.memory.policies import Reservoir as Reservoir
    from evertune.memory.policies import Ring as Ring
    from evertune.memory.view import MemoryView as MemoryView

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.memory.memory": "ReplayMemory",
        "evertune.memory.policies": "ClassBalanced Herding LossAware Policy Reservoir Ring",
        "evertune.memory.view": "MemoryView",
    },
)
