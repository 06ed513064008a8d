"""A service that keeps a registry up to date: it polls the source and runs an update as a child process when one is
due."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from evertune.live.alerts.base import Alert
from evertune.live.telemetry import Telemetry
from evertune.live.triggers import Situation, Trigger
from evertune.sources.base import SourceError
from evertune.utils.processes import PREEMPTED, SUPERVISOR, kill_group
from evertune.utils.secrets import without_secrets

if TYPE_CHECKING:
    from evertune.live.intake import IntakeReport
    from evertune.registry.lease import Lease
    from evertune.registry.registry import Registry

OUTCOMES = {0: "promoted", 3: "nothing", 4: "refused", 5: "stopped"}
"""The meaning of the exit codes of ``evertune update``; all others except :data:`PREEMPTED` are errors."""

STUDENT = "student"
"""The event by which an update reports what became of a student."""

_TAIL = 20  # lines of an update's output that are kept to report why it failed
_OF_RECORDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}  # names that fields must not have
_MIN_READ = 20  # records below which the share of bad ones is not judged

_T = TypeVar("_T")

logger = logging.getLogger("evertune.live")


class Following(Protocol):
    """The interface of the students of what is watched; :class:`~evertune.live.students.Students` implements it."""

    @property
    def registry(self) -> Registry: ...


class Updating(Protocol):
    """The interface of what is watched; :class:`~evertune.live.update.Updater` implements it."""

    @property
    def registry(self) -> Registry: ...

    @property
    def students(self) -> Following | None: ...

    @property
    def trigger(self) -> Trigger: ...

    def intake(self) -> IntakeReport: ...

    def situation(self) -> Situation: ...

    def due(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """The settings of ``evertune watch``.

    Args:
        poll: Seconds between two reads of the source. Default: 30.
        grace: Seconds that an update may take to end after SIGTERM before it is killed; it resumes at the next start.
            Default: 60.
        port: Port of ``/metrics`` and ``/healthz``; None for no server, 0 for any free port, which is logged.
        host: Address to listen on. Default: this machine only; use ``0.0.0.0`` in a container.
        max_backoff: Maximum number of seconds between two retries of something that keeps failing. The first retry
            comes after ``poll`` seconds, and each pause is twice the one before. Default: 600.
        max_errors: Number of failures in a row after which an alert is repeated, and failing updates make the service
            unhealthy. Default: 3.
        max_bad_share: Share of bad records among those read since the last update above which an alert is sent.
            Default: 0.05.
        retention: Number of newest versions that stay after a promotion, as by ``evertune registry gc --keep``, which
            cannot run beside a watch. Default: None deletes nothing.
        alerts: Channels that alerts are sent to.
        log: JSON lines or plain text. Default: plain text on a terminal, else JSON.

    Raises:
        ValueError: If a number is out of range.
    """

    poll: float = 30.0
    grace: float = 60.0
    port: int | None = None
    host: str = "127.0.0.1"
    max_backoff: float = 600.0
    max_errors: int = 3
    max_bad_share: float = 0.05
    retention: int | None = None
    alerts: list[Alert] = field(default_factory=list)
    log: Literal["auto", "json", "words"] = "auto"

    def __post_init__(self) -> None:
        for name in ("poll", "max_backoff", "max_errors"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.grace < 0:
            raise ValueError(f"grace must not be negative, got {self.grace}")
        if self.retention is not None and self.retention < 1:
            raise ValueError(f"retention must be positive or None, got {self.retention}")
        if not 0 < self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}")


class Watch:
    """Polls the source, and runs an update as a child process when one is due.

    This process takes records in and asks the trigger, under the registry's lease, which it holds until it ends. A
    child process does the training, so that its memory is released afterwards, and whatever kills it does not kill the
    service. An update that died resumes from its last checkpoint when it is run again.

    If the source becomes unreachable, the disk is full, or an update fails, the failure is reported once and retried
    with exponential backoff; the recovery is reported too.

    SIGTERM or SIGINT ends the service: at once if no update is in progress; otherwise the update receives a SIGTERM and
    has ``grace`` seconds before it is killed. A second signal kills it at once. If this process itself is killed, an
    update that has called :func:`end_with_supervisor` ends too.

    Example::

        updater = Updater("registry", FolderSource("inbox"), module, trainer)
        code = Watch(updater, [sys.executable, "my_update.py"], WatchSettings(port=9090)).run()

    Args:
        updater: The updater that is watched.
        command: Command of the child process that makes one update. Its exit code reports the outcome: see
            :data:`OUTCOMES`.
        settings: See :class:`WatchSettings`.

    Raises:
        ModuleNotFoundError: If the extra ``live`` is not installed.
    """

    def __init__(self, updater: Updating, command: Sequence[str], settings: WatchSettings | None = None) -> None:
        self.updater = updater
        self.command = list(command)
        self.settings = settings or WatchSettings()
        self.telemetry = Telemetry(3 * self.settings.poll + 1, self.settings.max_errors)
        self._intake = _Trouble("taking records in", self.settings)
        self._look = _Trouble("looking for what is due", self.settings)
        self._update = _Trouble("updating", self.settings)
        self._clean = _Trouble("deleting old versions", self.settings)
        self._stops = 0  # signals to end that have arrived
        self._in_step = False  # whether a signal may interrupt what the main thread does
        self._version: int | None = None
        self._waiting_told: tuple[int | None, int] | None = None  # production and pending records when it was reported
        self._drift_told: int | None = None  # the version in production when drift was last reported
        self._students: list[tuple[str, dict[str, Any]]] = []  # what the update has said of them
        self._read = self._bad = 0  # since the last update
        self._told_bad = False

    def run(self) -> int:
        """Watch until a signal ends the service. Must be called in the main thread.

        Returns:
            The exit code: 0 after a signal, 1 if the lease was lost to another process.

        Raises:
            LeaseHeld: If another process updates this registry.
            OSError: If the port is taken, or the registry cannot be written.
        """
        settings, registry = self.settings, self.updater.registry
        try:
            with self._signals(), ExitStack() as held:
                with self._breakable():
                    lease = held.enter_context(registry.lease("evertune watch"))
                if settings.port is not None:
                    port = self.telemetry.serve(settings.port, settings.host)
                    self._say("serving", f"metrics and health on http://{settings.host}:{port}", port=port)
                self._say("started", f"watching for {registry.store.root}, every {settings.poll:g} s")
                return self._loop(lease)
        except _Ended:
            return 0
        finally:
            self._say("ended", "the watch has ended")
            self.telemetry.close()
            for alert in settings.alerts:
                alert.close()

    # --- the loop

    def _loop(self, lease: Lease) -> int:
        while not self._stops:
            self.telemetry.beat()
            if not self._holds(lease):
                return 1
            self._try(self._intake, self._take_in)
            reason = self._try(self._look, self._due)
            if reason is not None and not self._update.waits and not self._make_update(reason, lease):
                return 1
            self._sleep(self.settings.poll)
        return 0

    def _take_in(self) -> None:
        report = self.updater.intake()
        self.telemetry.took_in(report.read, report.bad)
        self._read, self._bad = self._read + report.read, self._bad + report.bad
        if report.read:
            words = f"{report.read} records read, {report.bad} of them bad"
            self._say("intake", words, read=report.read, bad=report.bad)
        if self._read >= _MIN_READ and self._bad > self.settings.max_bad_share * self._read and not self._told_bad:
            self._told_bad = True
            words = f"{self._bad} of {self._read} records since the last update are bad. {report.words}"
            self._say("quarantine", words, logging.WARNING, bad=self._bad, read=self._read)

    def _due(self) -> str | None:
        situation = self.updater.situation()
        self._version = situation.production.number if situation.production else None
        self.telemetry.stands(self._version, situation.n_pending, situation.n_new, situation.last_update)
        if situation.production is not None:
            self.telemetry.serves(situation.production.manifest.metrics.average_accuracy)
        reason = self.updater.due()
        readings = self.updater.trigger.readings
        self.telemetry.measured(readings)
        state = (self._version, situation.n_pending)
        if situation.n_pending and not situation.n_new and self._waiting_told != state:
            self._waiting_told = state
            self._say("waiting", situation.nothing_new, pending=situation.n_pending)
        # Reported once per version: the drift lasts until an update has learned it.
        if _drifting(readings) and self._drift_told != self._version:
            self._drift_told = self._version
            self._say("drift", self.updater.trigger.explanation, logging.WARNING, **readings)
        return reason

    def _make_update(self, reason: str, lease: Lease) -> bool:
        """Run one update; False if the lease was lost meanwhile."""
        self._say("update", f"an update starts: {reason}", reason=reason)
        start, tail, code = time.monotonic(), deque[str](maxlen=_TAIL), 1
        self._students.clear()
        self.telemetry.updating(True)
        try:
            code = self._run_child(lease, tail)
        except OSError as error:
            tail.append(f"it could not be started: {error}")
        finally:
            self.telemetry.updating(False)
        seconds = time.monotonic() - start
        outcome = OUTCOMES.get(code, "interrupted" if self._stops or code == PREEMPTED else "error")
        if self._stops and outcome == "promoted" and not self._moved():  # Lightning exits with 0 after SIGTERM
            outcome = "interrupted"
        self.telemetry.updated(outcome, seconds)
        self._read = self._bad = 0
        self._told_bad = False
        self._report(outcome, code, tail, seconds)
        self._report_students()
        if (outcome == "promoted" or self._students) and self.settings.retention is not None:
            self._try(self._clean, partial(self._delete_old, self.settings.retention))
        return self._holds(lease)

    def _delete_old(self, keep: int) -> None:
        names = self.updater.registry.gc(keep)
        if self.updater.students is not None:
            names += self.updater.students.registry.gc(keep)
        if names:
            versions = [name for name in names if name.startswith("versions/")]
            words = f"{len(versions)} old versions and {len(names) - len(versions)} files that only they needed deleted"
            self._say("gc", words, deleted=names)

    def _report(self, outcome: str, code: int, tail: Sequence[str], seconds: float) -> None:
        end = tail[-1] if tail else "it has said nothing"
        facts: dict[str, Any] = {"outcome": outcome, "seconds": round(seconds, 1)}
        if outcome == "error":
            killed = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else None
            how = killed or f"failed with exit code {code}"
            self._failed(self._update, f"the update {how}: {end}", "update", output="\n".join(tail))
            return
        if outcome == "nothing" and self._students:
            self._worked(self._update)
            return
        if outcome == "nothing":  # although it was due: not an error, but it must not be repeated in every round
            self._update.failed()
            self._say("updated", f"the update found nothing to do: {end}", **facts)
            return
        if outcome == "interrupted":
            goes_on = "at the next start" if self._stops else "now"
            self._say("updated", f"the update was interrupted; it resumes {goes_on}", **facts)
            return
        self._worked(self._update)
        if outcome == "stopped":
            self._say("refusal", f"the update was stopped before training: {end}", logging.WARNING, **facts)
        else:
            with suppress(Exception):  # only adds detail to the message
                version = self.updater.registry.versions()[-1]
                facts |= {"version": version.number}
                end = version.manifest.summary
            if outcome == "refused":
                self._say("refusal", f"the new version was refused: {end}", logging.WARNING, **facts)
            else:
                self._say("promotion", f"a new version is in production: {end}", **facts)

    def _report_students(self) -> None:
        for words, facts in self._students:
            about: dict[str, Any] = {"outcome": facts.get("status"), "student": facts.get("version")}
            if facts.get("status") == "refused":
                self._say("refusal", words, logging.WARNING, **about)
            else:
                self._say("promotion" if facts.get("status") == "promoted" else "updated", words, **about)

    def _moved(self) -> bool:
        """Whether the version in production has changed since before the update."""
        try:
            production = self.updater.registry.production
        except Exception:  # unknown: do not claim a promotion
            return False
        return (production.number if production else None) != self._version

    # --- the child

    def _run_child(self, lease: Lease, tail: deque[str]) -> int:
        """Run the command to its end, forwarding signals; returns its exit code, negative for a signal."""
        # The child inherits one end of the pipe, whose other end closes when this process dies, however it dies: that
        # is how the child notices.
        theirs, ours = os.pipe()
        environment = {**os.environ, "EVERTUNE_LEASE": lease.token, SUPERVISOR: str(theirs)}
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=(theirs,),
                start_new_session=True,  # a process group of its own, so that all its children can be killed with it
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        reader = threading.Thread(target=self._pass_on, args=(process, tail), name="evertune-output", daemon=True)
        reader.start()
        deadline: float | None = None
        while process.poll() is None:
            self.telemetry.beat()
            now = time.monotonic()
            if self._stops and deadline is None:
                process.terminate()
                deadline = now + self.settings.grace
            if self._stops > 1 or (deadline is not None and now >= deadline) or not self._holds(lease):
                kill_group(process.pid)
                process.wait()
                break
            self._sleep(self.settings.poll if deadline is None else min(self.settings.poll, deadline - now))
        kill_group(process.pid)  # children that it may have left running
        os.close(ours)
        reader.join(5)
        return process.returncode

    def _pass_on(self, process: subprocess.Popen[str], tail: deque[str]) -> None:
        """Log the output of a child process line by line, and keep its last lines."""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line := line.rstrip():
                    level, words, facts = _understood(line)
                    tail.append(words)
                    logger.log(level, "%s", words, extra=facts)
                    if facts["event"] == "verdict":
                        self.telemetry.judged(facts.get("checks"))
                    elif facts["event"] == STUDENT:
                        self._students.append((words, facts))

    # --- failures, reports and alerts

    def _try(self, trouble: _Trouble, step: Callable[[], _T]) -> _T | None:
        """Run one step of the loop unless it is backing off; any error is reported, and the loop continues."""
        if trouble.waits:
            return None
        try:
            with self._breakable():
                result = step()
        except SourceError as error:
            self._failed(trouble, f"the source cannot be read: {error}", "source")
        except OSError as error:
            self._failed(trouble, f"files cannot be read or written: {error}", "storage")
        except Exception as error:
            self._failed(trouble, f"{trouble.what} failed: {type(error).__name__}: {error}", "watch", exc_info=True)
        else:
            self._worked(trouble)
            return result
        return None

    def _failed(self, trouble: _Trouble, words: str, where: str, exc_info: bool = False, **facts: Any) -> None:
        words = without_secrets(words)
        pause = trouble.failed()
        self.telemetry.failed(where, words)
        about = {"event": "error", "where": where, "pause": pause}
        logger.error("%s; next try in %.0f s", words, pause, extra=about, exc_info=exc_info)
        if trouble.count in (1, self.settings.max_errors):
            trouble.told = True
            self._alert("error", words, where=where, failures=trouble.count, **facts)

    def _worked(self, trouble: _Trouble) -> None:
        if trouble is self._intake:
            self.telemetry.recovered("source")
        failures, told = trouble.count, trouble.told
        trouble.recovered()
        if told:
            self._say("recovery", f"{trouble.what} works again, after {failures} failures", failures=failures)

    def _holds(self, lease: Lease) -> bool:
        from evertune.registry.registry import RegistryError

        try:
            lease.check()
        except RegistryError as error:
            self._say("error", f"the watch ends: {error}", logging.ERROR)
            return False
        except OSError:  # unknown for now: every write checks the lease again
            pass
        return True

    def _say(self, event: str, words: str, level: int = logging.INFO, **facts: Any) -> None:
        words = without_secrets(words.strip())
        logger.log(level, "%s", words, extra={"event": event, **facts})
        if event in ("drift", "refusal", "quarantine", "error", "recovery", "promotion"):
            self._alert(event, words, **facts)

    def _alert(self, event: str, words: str, **facts: Any) -> None:
        facts = {"registry": self.updater.registry.store.root, "version": self._version, **facts}
        facts = {name: without_secrets(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
        for alert in self.settings.alerts:
            try:
                alert.send(event, words, **facts)
            except Exception:
                logger.exception("an alert failed", extra={"event": "alert failed"})

    # --- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Count SIGTERM and SIGINT; they and the end of a child wake a :meth:`_sleep`."""
        # A handler alone does not interrupt select() in Python (PEP 475); a byte on the wake-up socket does.
        self._awake, wake = socket.socketpair()
        for end in (self._awake, wake):
            end.setblocking(False)
        old_fd = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGCHLD: lambda *_: None}
        old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            self._awake.close()
            wake.close()

    def _stop(self, number: int, frame: object) -> None:
        self._stops += 1
        if self._in_step:
            raise _Ended

    @contextmanager
    def _breakable(self) -> Iterator[None]:
        """A step that a signal may interrupt: like a kill, it leaves only complete files behind."""
        self._in_step = True
        try:
            if self._stops:
                raise _Ended
            yield
        finally:
            self._in_step = False

    def _sleep(self, seconds: float) -> None:
        if select.select([self._awake], [], [], max(seconds, 0))[0]:
            with suppress(BlockingIOError):
                # Drain the socket, or the next sleep would end at once.
                while self._awake.recv(4_096):
                    pass


class _Ended(BaseException):
    """A signal arrived while there was nothing to wait for."""


class _Trouble:
    """The failures in a row of one step, whether they were reported, and when to retry."""

    def __init__(self, what: str, settings: WatchSettings) -> None:
        self.what = what
        self.first, self.longest = settings.poll, settings.max_backoff
        self.recovered()

    @property
    def waits(self) -> bool:
        return time.monotonic() < self._until

    def failed(self) -> float:
        """Count a failure; returns the seconds until the next attempt."""
        self.count += 1
        # The exponent is bounded, as a float overflows after about a thousand failures.
        pause: float = min(self.longest, self.first * 2.0 ** min(self.count - 1, 30))
        self._until = time.monotonic() + pause
        return pause

    def recovered(self) -> None:
        """Reset the count."""
        self.count, self._until, self.told = 0, 0.0, False


def _understood(line: str) -> tuple[int, str, dict[str, Any]]:
    """A line of an update's output as level, message and fields: a log line of evertune's, or any other text."""
    try:
        fields = json.loads(line) if line.startswith("{") else {}
    except (ValueError, RecursionError):
        fields = {}
    if not {"event", "level", "message"} <= fields.keys():
        return logging.INFO, line, {"event": "output"}
    level = getattr(logging, str(fields["level"]).upper(), logging.INFO)
    facts = {name: value for name, value in fields.items() if name not in ("time", "level", *_OF_RECORDS)}
    return level if isinstance(level, int) else logging.INFO, str(fields["message"]), facts


def _drifting(readings: Mapping[str, float]) -> bool:
    """Whether a reading of a trigger is above its limit."""
    limits = {name.removesuffix("_threshold"): limit for name, limit in readings.items() if name.endswith("_threshold")}
    return any(readings.get(f"{name}_score", readings.get(name, 0.0)) > limit for name, limit in limits.items())
