"""Real processes for tests, forked from one that has imported the heavy packages: a start costs no imports."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.preloaded"])
