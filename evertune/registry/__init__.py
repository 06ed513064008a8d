"""The registry: numbered versions of a model, their aliases, and rollback."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.registry.manifest import Manifest as Manifest
    from evertune.registry.manifest import Metrics as Metrics
    from evertune.registry.manifest import VerdictSummary as VerdictSummary
    from evertune.registry.registry import LeaseHeld as LeaseHeld
    from evertune.registry.registry import Registry as Registry
    from evertune.registry.registry import RegistryError as RegistryError
    from evertune.registry.serving import Served as Served
    from evertune.registry.serving import load as load
    from evertune.registry.slice_index import SliceEntry as SliceEntry
    from evertune.registry.version import Version as Version

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.registry.manifest": "Manifest Metrics VerdictSummary",
        "evertune.registry.registry": "LeaseHeld Registry RegistryError",
        "evertune.registry.serving": "Served load",
        "evertune.registry.slice_index": "SliceEntry",
        "evertune.registry.version": "Version",
    },
)
