"""Writes the report that fits a path: that of a history, or that of a registry."""

from __future__ import annotations

from pathlib import Path

from evertune.utils.terminal import console


def make_report(history: Path, page: Path | None, plots: Path | None, suspects: Path | None = None) -> None:
    """Print the table of a history or a registry, and write its HTML page and its plots.

    Args:
        history: Path of a ``history.json``, or the folder of a registry.
        page: File to write the page to. By default ``report.html``: beside a history, and for a registry in the current
            folder.
        plots: Folder to write PNG plots to; None for no plots. For a history only.
        suspects: File to write the records with suspect labels to, as JSON lines; None for none. For a registry only.

    Raises:
        ValueError: If the file is not a history, or plots are asked for a registry, or suspect labels for a history.
        ImportError: If jinja2 or matplotlib is not installed.
    """
    from evertune.reports.plots import save_plots
    from evertune.reports.stream import write_report
    from evertune.reports.summary import summary_table

    screen = console()
    if history.is_dir():
        from evertune.reports.registry import versions_table, write_versions_report

        if plots is not None:
            raise ValueError("--plots is for a history.json; the page of a registry has its plots in it")
        screen.print(versions_table(history))
        page = write_versions_report(history, page or Path("report.html"))
        if suspects is not None:
            from evertune.reports.answers import write_suspects

            n_suspects = write_suspects(history, suspects)
            screen.print(f"suspect labels: {n_suspects:,} records in {suspects}", soft_wrap=True)
    elif suspects is not None:
        raise ValueError("--suspects is for a registry: a history.json has no records")
    else:
        screen.print(summary_table(history))
        page = write_report(history, page or history.with_name("report.html"))
    screen.print(f"report: {page}", soft_wrap=True)
    if plots is not None:
        save_plots(history, plots)
        screen.print(f"plots: {plots}", soft_wrap=True)
