"""Which process is rank 0, told from what launchers set."""

from __future__ import annotations

import pytest

from evertune.utils.ranks import is_leader

NAMES = ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")


@pytest.mark.parametrize(
    ("environment", "leads"),
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "1", "GROUP_RANK": "1", "LOCAL_RANK": "0"}, True),  # torchrun chose node 1
        ({"RANK": "1", "SLURM_PROCID": "0", "GROUP_RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),  # a process that Lightning has started
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_is_leader(environment: dict[str, str], leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_leader() is leads
