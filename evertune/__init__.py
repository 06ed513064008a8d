"""evertune keeps a fine-tuned transformer up to date: continual learning for PyTorch Lightning.

Importing the package loads no heavy library. Its DeepSpeed strategies are registered by name when Lightning is
imported, before or after evertune.
"""

from importlib import import_module

from evertune._lightning import when_imported
from evertune.strategies import register_strategies

TYPE_CHECKING = False  # importing `typing` would take longer than the rest of this file
if TYPE_CHECKING:
    from typing import Any

    from evertune.metrics.history import History
    from evertune.registry.serving import load
    from evertune.training.trainer import ContinualTrainer
    from evertune.training.weights import save_weights

__all__ = ["ContinualTrainer", "History", "load", "save_weights"]

when_imported(register_strategies)

_HOMES = {
    "ContinualTrainer": "evertune.training.trainer",
    "History": "evertune.metrics.history",
    "load": "evertune.registry.serving",
    "save_weights": "evertune.training.weights",
}


def __getattr__(name: str) -> "Any":
    # Names are imported when they are first used, so that `import evertune` stays fast.
    if name == "__version__":
        from importlib.metadata import version

        return version("evertune")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evertune' has no attribute {name!r}")
