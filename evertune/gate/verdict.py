"""The decision of the gate: every check that was made, and whether the new version may go into production."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from evertune.gate.words import Unit, figure, percent, probability
from evertune.utils.terminal import foreign

if TYPE_CHECKING:
    from rich.table import Table

Limit = Literal["value", "less", "more"]
Stage = Literal["data", "model"]
State = Literal["passed", "refused", "cannot tell", "not applicable"]

MANY = 10
"""Number of passed checks of one kind above which a table shows them in one line."""
_DIGITS = 6
_STYLES: Mapping[State, str] = {
    "passed": "green",
    "refused": "bold red",
    "cannot tell": "yellow",
    "not applicable": "dim",
}


@dataclass(frozen=True)
class Check:
    """The result of one check of the gate.

    Args:
        name: Name of the check.
        slice: Slice that was checked; empty if the check is not about a slice.
        champion: Value of the version in production; None if it has none.
        challenger: Value of the new version, or of the data.
        limit: Limit of the gate; see ``limit_on``.
        p_value: Probability of such a result by chance; None if chance plays no part.
        passed: Whether the value is within the limit; None if there is too little evidence to tell, which refuses
            nothing and is reported.
        words: The facts, as a message.
        stage: ``"data"`` for a check of the records before training, ``"model"`` for one of the new version.
        unit: Unit of the values.
        applicable: False if the limit is set but the task has no classes to check it on; the check then counts as
            passed.
        limit_on: What the limit is on: the new version's ``"value"``, or how much ``"less"`` or ``"more"`` it is than
            production's.
    """

    name: str
    slice: str
    champion: float | None
    challenger: float | None
    limit: float | None
    p_value: float | None
    passed: bool | None
    words: str
    stage: Stage = "model"
    unit: Unit = "share"
    applicable: bool = True
    limit_on: Limit = "value"

    @property
    def state(self) -> State:
        """The result in one word, as the table shows it."""
        if not self.applicable:
            return "not applicable"
        return "cannot tell" if self.passed is None else "passed" if self.passed else "refused"

    @property
    def figures(self) -> tuple[str, str, str, str]:
        """The values of production and of the new version, the limit and the p-value, as tables show them."""
        chance = "" if self.p_value is None else probability(self.p_value).removeprefix("p ").removeprefix("= ")
        return figure(self.champion, self.unit), figure(self.challenger, self.unit), _limit(self), chance

    @classmethod
    def of_records(cls, name: str, share: float, limit: float, words: str) -> Check:
        """A check of the records before training: a share and its upper limit."""
        words = f"{words} ({percent(share)}, limit {percent(limit)})"
        return cls(name, "", None, _rounded(share), _rounded(limit), None, share <= limit, words, "data")

    @classmethod
    def of_version(
        cls,
        name: str,
        slice: str,
        champion: float | None,
        challenger: float | None,
        limit: float | None,
        passed: bool | None,
        words: str,
        p_value: float | None = None,
        unit: Unit = "share",
        on: Limit = "value",
    ) -> Check:
        """A check of the new version."""
        before, after, allowed, chance = (_rounded(value) for value in (champion, challenger, limit, p_value))
        passed = None if passed is None else bool(passed)
        return cls(name, slice, before, after, allowed, chance, passed, words, "model", unit, limit_on=on)

    @classmethod
    def not_applicable(cls, name: str, stage: Stage = "model") -> Check:
        """The result for a limit that is set although the labels of the task are not classes."""
        words = f"{name}: not applicable, because the labels of this task are not classes"
        return cls(name, "", None, None, None, None, True, words, stage, applicable=False)


@dataclass(frozen=True)
class Verdict:
    """The decision of the gate, with its reasons.

    The same predictions give the same verdict, and :meth:`to_dict` the same JSON, byte for byte.

    Args:
        passed: Whether no check has refused. Those that cannot tell refuse nothing.
        checks: All checks that were made.
    """

    passed: bool
    checks: list[Check]

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Verdict:
        """The verdict that follows from a list of checks.

        >>> Verdict.of([]).words()
        'passed: nothing was checked'
        """
        made = list(checks)
        return cls(all(check.passed is not False for check in made), made)

    @property
    def failed(self) -> list[Check]:
        """The checks that refused."""
        return [check for check in self.checks if check.passed is False]

    @property
    def undecided(self) -> list[Check]:
        """The checks that had too little evidence to pass or to refuse."""
        return [check for check in self.checks if check.passed is None]

    def words(self) -> str:
        """The decision as a message: why the new version was refused, or how it compares."""
        if not self.passed:
            return "refused: " + "; ".join(check.words for check in self.failed)
        told = [check.words for check in self.checks if check.name in ("new records", "forgetting", "accuracy")][-2:]
        n_checks = f"{len(self.checks)} checks" if self.checks else "nothing was checked"
        open_ = [f"{check.name} {check.slice!r} {check.words.partition(':')[0]}" for check in self.undecided]
        more = [f"and {len(open_) - 3} more cannot tell"] if len(open_) > 3 else []
        return "passed: " + "; ".join([n_checks, *told, *open_[:3], *more])

    def table(self) -> Table:
        """All checks as a table for the terminal: ``rich.print(verdict.table())``.

        More than 10 passed checks of one kind, such as those of many classes, are one line.
        """
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for header in ("check", "slice"):
            # These two share the room that the figures leave; the longest word in them is "calibration".
            table.add_column(header, overflow="fold", min_width=11)
        for header in ("production", "new version", "limit", "p"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        passed = Counter(check.name for check in self.checks if check.state == "passed")
        for check in self.checks:
            verdict = foreign(check.state, _STYLES[check.state])
            if check.state == "passed" and (n := passed[check.name]) > MANY:
                passed[check.name] = -1
                table.add_row(foreign(check.name), f"{n} of them", "", "", "", "", verdict)
            elif check.state != "passed" or passed[check.name] >= 0:
                table.add_row(foreign(check.name), foreign(check.slice), *check.figures, verdict)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """The verdict that :meth:`to_dict` returned.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        try:
            return cls(values["passed"], [Check(**check) for check in values["checks"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a saved verdict: {type(error).__name__}: {error}") from error


def _limit(check: Check) -> str:
    """The limit as the table shows it: how much less or more than production's value, if it is not on the value."""
    if check.limit is None or check.limit_on == "value":
        return figure(check.limit, check.unit)
    if check.unit == "nats":
        return f"{figure(check.limit, check.unit)} {check.limit_on}"
    return f"{100 * check.limit:.1f} points {check.limit_on}"


def _rounded(value: float | None) -> float | None:
    """Six significant digits, so that a verdict does not depend on a machine's rounding errors; None for NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")
