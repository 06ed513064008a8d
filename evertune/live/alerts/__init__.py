"""Alerts for the people who run the service, one channel a file."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.live.alerts.base import EVENTS as EVENTS
    from evertune.live.alerts.base import Alert as Alert
    from evertune.live.alerts.base import QueuedAlert as QueuedAlert
    from evertune.live.alerts.mail import Email as Email
    from evertune.live.alerts.webhook import Webhook as Webhook

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.live.alerts.base": "EVENTS Alert QueuedAlert",
        "evertune.live.alerts.mail": "Email",
        "evertune.live.alerts.webhook": "Webhook",
    },
)
