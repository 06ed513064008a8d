"""Launchers, one per file: they start a command of evertune on many processes."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.launch.settings import LaunchSettings as LaunchSettings

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.launch.settings": "LaunchSettings",
    },
)
