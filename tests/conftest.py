"""What all tests rely on."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections import defaultdict
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore = ["helpers/preloaded.py"]  # for the fork server: importing it costs what the tests are to be spared

# With both Lightnings installed the tests, and the processes that they start, use one; `make test-lightning` the other.
if find_spec("pytorch_lightning"):
    os.environ.setdefault("EVERTUNE_LIGHTNING", "pytorch_lightning")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be the processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_seed_is_left_behind() -> Iterator[None]:
    """``seed_everything`` writes to the environment, and ranks that a later test starts would seed themselves anew."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Benchmarks and examples silence loggers for their own run, and a later test would not see what these log."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, logger.disabled, logger.propagate) for logger in loggers]
    try:
        return (yield)
    finally:
        for logger, level, disabled, propagate in before:
            if logger.level != level:  # setting it empties the caches of all loggers, of which there are a thousand
                logger.setLevel(level)
            logger.disabled, logger.propagate = disabled, propagate


LONGEST = (
    "callbacks/test_shard_exact.py",
    "test_lightning.py",
    "live/test_update.py",
    "export/test_export.py",
    "callbacks/test_drift_trigger.py",
    "test_docs.py",
    "cli/test_update.py",
    "test_examples.py",
    "registry/test_registry.py",
    "strategies/test_deepspeed.py",
    "cli/test_drift.py",
    "ui/test_changes.py",
    "launch/test_slurm.py",
    "serve/test_workers.py",
    "ui/test_browser.py",
    "training/test_bit_exact_resume.py",
)
"""Files that take minutes together: they come first, so that no core waits for another at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


_TO_INSTALL = re.compile(r"\((apt-get install|pip install) ([^()]+)\)")
NO_SKIPS = "EVERTUNE_NO_SKIPS"
"""Set it where everything that tests need is installed: a test that is skipped then fails the run."""


def skips(config: pytest.Config) -> list[str]:
    """The reasons of the skipped tests, other than that there is no GPU."""
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in reports if isinstance(report.longrepr, tuple)]
    return [reason for reason in reasons if "GPU" not in reason]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get(NO_SKIPS) and not hasattr(session.config, "workerinput") and skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what to install so that no test is skipped."""
    reasons = skips(config)
    if not reasons:
        return
    packages: defaultdict[str, set[str]] = defaultdict(set)
    for command, names in _TO_INSTALL.findall("\n".join(reasons)):
        packages[command].update(names.split())
    commands = "; ".join(f"{command} {' '.join(sorted(names))}" for command, names in sorted(packages.items()))
    terminalreporter.line("")
    terminalreporter.line(f"{len(reasons)} tests were skipped. To run them too: {commands or 'see the reasons above'}")
    if os.environ.get(NO_SKIPS):
        terminalreporter.line(f"{NO_SKIPS} is set, so this run has failed", red=True)
