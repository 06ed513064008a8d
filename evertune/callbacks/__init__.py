"""How a module learns without forgetting: one method per file."""

from evertune.callbacks.base import ContinualCallback

__all__ = ["ContinualCallback"]
