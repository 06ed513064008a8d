"""The completion script works in a real shell."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from evertune.cli.main import main


def test_bash_completes_commands_options_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)  # commands set their own
    with pytest.raises(SystemExit) as end:
        main(["completion", "bash"])
    signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 0
    (tmp_path / "live.yaml").touch()
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("evertune", *words))
        script = f'. ./complete.sh; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _evertune; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("up") == ["update"] and {"registry", "report"} <= set(completed("re"))
    assert completed("watch", "--watch.po") == ["--watch.poll", "--watch.port"]
    assert "--gate.max_forgetting" in completed("update", "--gate.max_f")
    assert "--trainer.max_epochs" in completed("fit", "--trainer.max_e")
    assert completed("update", "--config", "li") == ["live.yaml"]
