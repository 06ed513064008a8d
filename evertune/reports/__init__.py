"""What a person looks at: HTML pages, PNG plots and tables in the terminal."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.reports.plots import save_plots as save_plots
    from evertune.reports.stream import write_report as write_report
    from evertune.reports.summary import summary_table as summary_table

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.reports.plots": "save_plots",
        "evertune.reports.stream": "write_report",
        "evertune.reports.summary": "summary_table",
    },
)
