"""What a person looks at: the HTML report, PNG plots and the table in the terminal, all from a run's history."""

from evertune.reports.html import write_report
from evertune.reports.plots import save_plots
from evertune.reports.summary import summary_table

__all__ = ["save_plots", "summary_table", "write_report"]
