"""Periodic updates from a source, as transactions: a checked new version, or the old one as it was."""

from evertune.live.triggers import AllOf, AnyOf, Drift, Every, Schedule, Situation, Trigger, Volume
from evertune.live.update import Outcome, Updater, UpdateSettings

__all__ = [
    "AllOf",
    "AnyOf",
    "Drift",
    "Every",
    "Outcome",
    "Schedule",
    "Situation",
    "Trigger",
    "UpdateSettings",
    "Updater",
    "Volume",
]
