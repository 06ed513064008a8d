"""Exports a version for other runtimes: ONNX, torch.export, transformers; checked against the version itself."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.export.exported import ExportedModel as ExportedModel
    from evertune.export.exporting import RefusedExportError as RefusedExportError
    from evertune.export.exporting import export as export
    from evertune.export.manifest import Check as Check
    from evertune.export.manifest import ExportManifest as ExportManifest

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.export.exported": "ExportedModel",
        "evertune.export.exporting": "RefusedExportError export",
        "evertune.export.manifest": "Check ExportManifest",
    },
)
