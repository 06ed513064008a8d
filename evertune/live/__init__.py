"""Periodic updates from a source, as transactions: a checked new version, or the old one as it was."""

from evertune.live.thresholds import Quantile, RollingAverage, Static, Threshold
from evertune.live.triggers import (
    AllOf,
    AnyOf,
    CoolDown,
    CostBudget,
    Drift,
    Every,
    LabelDrift,
    PerformanceDrop,
    Schedule,
    Situation,
    Trigger,
    Volume,
    WarmUp,
)
from evertune.live.update import Outcome, Updater, UpdateSettings

__all__ = [
    "AllOf",
    "AnyOf",
    "CoolDown",
    "CostBudget",
    "Drift",
    "Every",
    "LabelDrift",
    "Outcome",
    "PerformanceDrop",
    "Quantile",
    "RollingAverage",
    "Schedule",
    "Situation",
    "Static",
    "Threshold",
    "Trigger",
    "UpdateSettings",
    "Updater",
    "Volume",
    "WarmUp",
]
