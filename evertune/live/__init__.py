"""Periodic updates from a source, each a transaction: a checked new version goes live, or nothing changes."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.live.outcome import Outcome as Outcome
    from evertune.live.settings import StudentSettings as StudentSettings
    from evertune.live.settings import UpdateSettings as UpdateSettings
    from evertune.live.triggers.base import Situation as Situation
    from evertune.live.triggers.base import Trigger as Trigger
    from evertune.live.triggers.basic import AllOf as AllOf
    from evertune.live.triggers.basic import AnyOf as AnyOf
    from evertune.live.triggers.basic import Every as Every
    from evertune.live.triggers.basic import Schedule as Schedule
    from evertune.live.triggers.basic import Volume as Volume
    from evertune.live.triggers.drift import Drift as Drift
    from evertune.live.triggers.drift import LabelDrift as LabelDrift
    from evertune.live.triggers.performance import PerformanceDrop as PerformanceDrop
    from evertune.live.triggers.policies import CoolDown as CoolDown
    from evertune.live.triggers.policies import CostBudget as CostBudget
    from evertune.live.triggers.policies import WarmUp as WarmUp
    from evertune.live.triggers.thresholds import Quantile as Quantile
    from evertune.live.triggers.thresholds import RollingAverage as RollingAverage
    from evertune.live.triggers.thresholds import Static as Static
    from evertune.live.triggers.thresholds import Threshold as Threshold
    from evertune.live.update import Updater as Updater

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.live.outcome": "Outcome",
        "evertune.live.settings": "StudentSettings UpdateSettings",
        "evertune.live.triggers.base": "Situation Trigger",
        "evertune.live.triggers.basic": "AllOf AnyOf Every Schedule Volume",
        "evertune.live.triggers.drift": "Drift LabelDrift",
        "evertune.live.triggers.performance": "PerformanceDrop",
        "evertune.live.triggers.policies": "CoolDown CostBudget WarmUp",
        "evertune.live.triggers.thresholds": "Quantile RollingAverage Static Threshold",
        "evertune.live.update": "Updater",
    },
)
