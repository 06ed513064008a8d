"""What the fork server of the tests imports: all that a rank of any strategy, or an update, would import first.

Nothing that reads a rank's environment when it is imported belongs here.
"""

from __future__ import annotations

import gc
from importlib import import_module

from evertune.strategies import deepspeed
from evertune.strategies.extensions import load_extension

deepspeed._prepare_environment()
for module in (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles at its import, for which torch loads Inductor
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "evertune.callbacks.drift_trigger",
    "evertune.cli.fit",
    "evertune.cli.update",
    "evertune.live.evaluation",
    "evertune.live.training",
    "evertune.training.elastic",
    "evertune.training.stream_run",
    "pandas",  # pyarrow imports it for its first table
    "tests.helpers.live_worker",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
):
    import_module(module)

load_extension()  # compiled here if need be: no test waits for it with a time limit of its own

gc.freeze()  # ZeRO-3 collects garbage at every start and end of a fit, and would go through all of the above
