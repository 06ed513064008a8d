"""The code in ``docs/avalanche.md`` runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.avalanche.loops import Module, data, network
from tests.test_docs import NOT_RUN, blocks

DOCUMENT = "docs/avalanche.md"


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [block.text for block in blocks(DOCUMENT) if block.language == "python"]
    assert len(shown) == 2
    assert all(any(text.startswith(start) for start in NOT_RUN) for text in shown)
    net = network(10)
    names = {
        "train_data": data(10),
        "test_data": data(10),
        "my_module": Module(10),
        "network": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
    }
    before = nn.utils.parameters_to_vector(net.parameters()).clone()
    for text in shown:
        exec(text, names)
    assert len(names["history"].accuracy_matrix) == 5  # type: ignore[attr-defined]
    assert not torch.equal(before, nn.utils.parameters_to_vector(net.parameters()))
