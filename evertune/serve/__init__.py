"""Answers requests over HTTP with the version in production, and follows its alias without dropping a request."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.serve.app import application as application
    from evertune.serve.service import Service as Service
    from evertune.serve.settings import BatchSettings as BatchSettings
    from evertune.serve.settings import LimitSettings as LimitSettings

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.serve.app": "application",
        "evertune.serve.service": "Service",
        "evertune.serve.settings": "BatchSettings LimitSettings",
    },
)
