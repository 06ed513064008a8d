"""What the tests of live updates start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.live_worker import feed, prepare, updater


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with version 1, of two layers and two classes, in production. Work on copies of it."""
    folder = tmp_path_factory.mktemp("first")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=60)
    assert updater(folder).run().status == "promoted"
    return folder
