"""What is kept of the past: the replay memory and its selection policies."""

from evertune.memory.memory import MemoryView, ReplayMemory
from evertune.memory.policies import ClassBalanced, Herding, Policy, Reservoir, Ring

__all__ = ["ClassBalanced", "Herding", "MemoryView", "Policy", "ReplayMemory", "Reservoir", "Ring"]
