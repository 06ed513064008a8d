"""What a run of the tests says about those that were skipped."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SKIPPING = """
import pytest

def test_program():
    pytest.skip("sshd is not installed (apt-get install openssh-server)")

def test_library():
    pytest.importorskip("no_such_library", reason='it is not installed (pip install "evertune[s3]" "moto[server]")')

def test_gpu():
    pytest.skip("needs a GPU")

def test_that_runs():
    pass
"""


@pytest.mark.parametrize(("value", "code", "workers"), [("", 0, []), ("1", 1, ["-n", "1"])])
def test_skipped_tests_are_named_with_what_to_install_and_fail_where_everything_is(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str, code: int, workers: list[str]
) -> None:
    monkeypatch.setenv("EVERTUNE_NO_SKIPS", value)
    done = run(pytester, SKIPPING, *workers)
    assert done.ret == code
    done.assert_outcomes(passed=1, skipped=3)
    command = 'apt-get install openssh-server; pip install "evertune[[]s3]" "moto[[]server]"'
    done.stdout.fnmatch_lines([f"2 tests were skipped. To run them too: {command}"])


def test_a_gpu_may_be_missing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERTUNE_NO_SKIPS", "1")
    done = run(pytester, "import pytest\n\ndef test_gpu():\n    pytest.skip('needs a GPU')")
    assert done.ret == 0
    assert "tests were skipped" not in done.stdout.str()


SILENCING = """
import logging
import pytest

logger = logging.getLogger("some.library")

@pytest.fixture(scope="module")
def silent():
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.disabled = True

def test_that_silences_a_logger(silent):
    pass

def test_that_listens(caplog):
    with caplog.at_level("INFO"):
        logger.info("a step")
    assert "a step" in caplog.text
"""


def test_a_logger_that_one_test_silences_speaks_in_the_next(pytester: pytest.Pytester) -> None:
    run(pytester, SILENCING).assert_outcomes(passed=2)


def run(pytester: pytest.Pytester, tests: str, *arguments: str) -> pytest.RunResult:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(tests)
    return pytester.runpytest_subprocess(*arguments)
