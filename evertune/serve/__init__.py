"""Answers requests over HTTP with the version in production, and follows its alias without dropping a request."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.serve.access import Access as Access
    from evertune.serve.app import application as application
    from evertune.serve.log import RequestLog as RequestLog
    from evertune.serve.service import Service as Service
    from evertune.serve.settings import AccessSettings as AccessSettings
    from evertune.serve.settings import BatchSettings as BatchSettings
    from evertune.serve.settings import DriftSettings as DriftSettings
    from evertune.serve.settings import LimitSettings as LimitSettings
    from evertune.serve.settings import LogSettings as LogSettings
    from evertune.serve.settings import OnnxSettings as OnnxSettings
    from evertune.serve.settings import TrafficSettings as TrafficSettings

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.serve.access": "Access",
        "evertune.serve.app": "application",
        "evertune.serve.log": "RequestLog",
        "evertune.serve.service": "Service",
        "evertune.serve.settings": "AccessSettings BatchSettings DriftSettings "
        "LimitSettings LogSettings OnnxSettings TrafficSettings",
    },
)
