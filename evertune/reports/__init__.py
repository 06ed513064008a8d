"""Reports for people: HTML pages, PNG plots and tables in the terminal."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.reports.drift import write_drift_report as write_drift_report
    from evertune.reports.plots import save_plots as save_plots
    from evertune.reports.registry import versions_table as versions_table
    from evertune.reports.registry import write_versions_report as write_versions_report
    from evertune.reports.stream import write_report as write_report
    from evertune.reports.summary import summary_table as summary_table

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.reports.drift": "write_drift_report",
        "evertune.reports.plots": "save_plots",
        "evertune.reports.registry": "versions_table write_versions_report",
        "evertune.reports.stream": "write_report",
        "evertune.reports.summary": "summary_table",
    },
)
