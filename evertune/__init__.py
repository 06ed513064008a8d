"""evertune keeps a fine-tuned transformer up to date: continual learning for PyTorch Lightning.

Importing the package registers its DeepSpeed strategies with Lightning by name and loads nothing heavy.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from evertune.strategies import register_strategies

if TYPE_CHECKING:
    from evertune.metrics.history import History
    from evertune.registry.serving import load
    from evertune.training.trainer import ContinualTrainer

__all__ = ["ContinualTrainer", "History", "load"]
__version__ = version("evertune")

register_strategies()

_HOMES = {
    "ContinualTrainer": "evertune.training.trainer",
    "History": "evertune.metrics.history",
    "load": "evertune.registry.serving",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evertune' has no attribute {name!r}")
