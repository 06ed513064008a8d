"""Processes that have imported neither evertune nor a Lightning, but what those would import for seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = """
torch._dynamo torch.distributed.fsdp torch.distributed.tensor torch.utils.tensorboard torch.utils.data
torchmetrics torchmetrics.functional transformers.models.bert.modeling_bert transformers.models.auto.modeling_auto
transformers.models.auto.tokenization_auto deepspeed deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2
pandas datasets jsonargparse matplotlib.pyplot jinja2
"""

SERVER = """
import importlib, json, os, runpy, sys

for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
assert not {"evertune", "lightning", "pytorch_lightning", "lightning_fabric"} & set(sys.modules)

for line in sys.stdin:
    job, child = json.loads(line), os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

for descriptor, path in enumerate([os.devnull, *job["files"]]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
os.environ.clear()
os.environ.update(job["environment"])
how, what, *rest = job["arguments"]
sys.argv = [how if how == "-c" else what, *rest]
if how == "-c":
    exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
else:
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


class Fresh:
    """Runs Python as ``python -c CODE`` and ``python -m MODULE`` would, forked from a process that it starts."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *PRELOADED.split()],
            env=environment | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """The exit code and the output of ``-c`` and code, or ``-m``, a module, and its arguments."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            job = {"arguments": arguments, "environment": environment, "files": [*map(str, files)]}
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            code = ""
            while not code.lstrip("-").isdigit():  # an import may have written something
                code = self._server.stdout.readline().strip()
                assert code or self._server.poll() is None
            return subprocess.CompletedProcess(arguments, int(code), *(file.read_text() for file in files))

    def close(self) -> None:
        """End the process."""
        self._server.communicate()
