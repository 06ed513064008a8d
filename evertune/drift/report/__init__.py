"""Two sets of records compared: whether they differ, since when, in what, and a page that shows it."""

from evertune.drift.report.compare import compare
from evertune.drift.report.comparison import Comparison
from evertune.drift.report.page import write_page

__all__ = ["Comparison", "compare", "write_page"]
