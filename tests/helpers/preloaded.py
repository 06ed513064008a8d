"""What the fork server of the tests imports: all that a rank of any strategy, or an update, would import first.

Nothing that reads a rank's environment when it is imported belongs here.
"""

from __future__ import annotations

from importlib import import_module

from evertune.strategies import deepspeed
from evertune.strategies.extensions import load_extension

for module in (
    "evertune.callbacks.drift_trigger",
    "evertune.live.evaluation",
    "evertune.live.training",
    "evertune.training.elastic",
    "evertune.training.stream_run",
    "tests.helpers.live_worker",
    "transformers.models.bert.modeling_bert",
):
    import_module(module)

deepspeed._prepare_environment()
load_extension()  # compiled here if need be: no test waits for it with a time limit of its own
