"""What all tests rely on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

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
