"""``evertune registry``: inspect versions, change which one is in production, verify files, clean up."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from evertune.cli.actions import REGISTRY, opened
from evertune.registry.aliases import ALIASES
from evertune.registry.registry import LeaseHeld, Registry, RegistryError
from evertune.registry.version import Version
from evertune.utils.shares import UNKNOWN, percent
from evertune.utils.terminal import complain, console, foreign

if TYPE_CHECKING:
    from evertune.reports.listing import Listing

_SHOWN = 50  # versions listed without --all

_EPILOG = (
    "Examples: evertune registry list news; evertune registry rollback news --reason 'wrong labels'. "
    "Exit codes: 0 done, 1 an error, or what `verify` found, 2 a wrong argument. `evertune registry verify` says what "
    "is damaged."
)


def add_registry_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``registry`` and its actions to a parser. :func:`run_registry` takes the arguments that they parse."""
    parser = subparsers.add_parser(
        "registry",
        help="look at versions, promote, roll back, verify, clean up",
        description="Look at the versions of a registry, change which is in production, check and clean up.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, words: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", epilog=_EPILOG)
        action.add_argument("registry", metavar="REGISTRY", help=REGISTRY)
        action.add_argument("--json", action="store_true", help="print JSON, for machines")
        return action

    one_of = f"its number, or {', '.join(ALIASES)}"
    listing = add("list", "list the versions")
    listing.add_argument("--all", action="store_true", help=f"not only the newest {_SHOWN}; JSON always has all")
    listing.add_argument("--events", action="store_true", help="list what happened to the aliases instead")
    show = add("show", "show all that is known of a version")
    show.add_argument("version", nargs="?", default="production", help=f"{one_of} (default: production)")
    show.add_argument("--config", action="store_true", help="also the configuration of the update, as YAML")
    promote = add("promote", "put a version into production")
    promote.add_argument("version", help=one_of)
    promote.add_argument("--reason", default="", help="why, for the list of events")
    promote.add_argument(
        "--force",
        action="store_true",
        help="even if the gate refused it; also makes new aliases where they are damaged",
    )
    promote.add_argument("--no_verify", action="store_true", help="do not compare its files with their sha256 first")
    rollback = add("rollback", "put the previous version back into production")
    rollback.add_argument("--reason", default="", help="why, for the list of events")
    rollback.add_argument(
        "--discard", action="store_true", help="do not learn again what the version rolled back from had learned"
    )
    diff = add("diff", "compare two versions")
    diff.add_argument("a", nargs="?", default="previous", help=f"{one_of} (default: previous)")
    diff.add_argument("b", nargs="?", default="production", help=f"{one_of} (default: production)")
    verify = add("verify", "compare all files with their sha256")
    verify.add_argument("version", nargs="?", help=f"{one_of} (default: the whole registry)")
    add("repair", "set damaged records aside, with what can be read of them, so that updates go on")
    gc = add("gc", "delete old versions and what only they needed")
    gc.add_argument("--keep", type=int, default=5, help="how many of the newest versions stay (default: 5)")
    gc.add_argument("--dry_run", action="store_true", help="only list what would be deleted")
    gc.add_argument(
        "--stale_days", type=float, default=7.0, help="days after which unfinished things are deleted (default: 7)"
    )


def run_registry(arguments: argparse.Namespace) -> int:
    """Run one of the actions of ``evertune registry``.

    Args:
        arguments: What the parser of :func:`add_registry_commands` returned.

    Returns:
        The exit code: 0; 1 after an error, which is reported in one line on stderr, or if ``verify`` found a problem.
    """
    try:
        registry = opened(arguments.registry)
        # Warnings become plain lines on stderr, without the file and line of the code that raised them.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code = _ACTIONS[arguments.action](registry, arguments)
        for warning in caught:
            _complain(arguments, str(warning.message))
        return code
    except BrokenPipeError:
        raise
    except (RegistryError, OSError, ValueError, ModuleNotFoundError) as error:
        _complain(arguments, str(error))
        return 1


def _complain(arguments: argparse.Namespace, words: str) -> None:
    complain(f"evertune registry {arguments.action}", " ".join(words.split()))


def _list(registry: Registry, arguments: argparse.Namespace) -> int:
    if arguments.events:
        columns = ["time", "action", "from", "to", "reason", "by"]
        rows = [[event.get(column) for column in columns] for event in registry.events]
        _print(arguments, registry.events, lambda: [_table(columns, rows)])
        return 0
    problem = ""
    try:
        aliases = registry.aliases
    except RegistryError as error:  # when the aliases are damaged, the list of versions is what helps to repair them
        problem, aliases = str(error), {}
    versions, damaged = registry.survey()
    parents: dict[int | None, Version] = {version.number: version for version in versions}
    found: dict[str, Any] = {
        "registry": registry.store.root,
        "aliases": aliases,
        "versions": [_line(version, aliases, parents.get(version.parent)) for version in versions],
        "damaged": [{"version": number, "problem": words} for number, words in damaged.items()],
    }

    def tables() -> Iterable[Any]:
        if not versions and not damaged:
            yield f"{registry.store.root} holds no version yet"
            return
        # Older versions are left out, except those with an alias: production may be one of them.
        newest = len(versions) if arguments.all else _SHOWN
        shown = [line for line in found["versions"][:-newest] if line["aliases"]] + found["versions"][-newest:]
        columns = ["version", "alias", "created (UTC)", "records", "accuracy", "change", "verdict", "reason"]
        rows = [
            [
                line["version"],
                " ".join(line["aliases"]),
                line["created"][:16].replace("T", " "),
                line["records"].get("train"),
                percent(line["average_accuracy"]),
                _points(line["change"]),
                "passed" if line["passed"] else "refused",
                line["reason"],
            ]
            for line in shown
        ]
        rows += [[number, *[None] * (len(columns) - 3), "damaged", words] for number, words in damaged.items()]
        rows.sort(key=lambda row: row[0])
        yield _table(columns, rows, right=("version", "records", "accuracy", "change"))
        if any(line["change"] is not None for line in shown):
            yield "change: in points, from the version it was trained from, on the slices of both"
        if len(shown) < len(versions):
            yield f"{len(versions) - len(shown)} older versions are not shown: --all"

    _print(arguments, found, tables)
    if problem:
        raise RegistryError(problem)
    return 0


def _line(version: Version, aliases: Mapping[str, int], parent: Version | None) -> dict[str, Any]:
    """The entry of a version in the list, as JSON values."""
    manifest = version.manifest
    return {
        "version": version.number,
        "aliases": [alias for alias, number in aliases.items() if number == version.number],
        "created": manifest.created.isoformat(),
        "parent": version.parent,
        "kind": manifest.kind,
        "experience": version.experience,
        "records": manifest.records,
        "average_accuracy": manifest.metrics.average_accuracy,
        "change": None if parent is None else manifest.metrics.change_from(parent.manifest.metrics),
        "passed": version.passed,
        "reason": (manifest.reason if version.passed else "") or manifest.summary,
    }


def _show(registry: Registry, arguments: argparse.Namespace) -> int:
    from evertune.reports.listing import brief
    from evertune.reports.summary import spent
    from evertune.reports.versions import base_words
    from evertune.utils.clock import PARTS

    version = registry.version(arguments.version)
    manifest, aliases = version.manifest.to_dict(), registry.aliases
    events = [event for event in registry.events if version.number in (event.get("from"), event.get("to"))]
    sizes = registry.store.sizes(f"versions/{version.number}")
    names = [alias for alias, number in aliases.items() if number == version.number]
    slices = version.slices()
    found = {
        **manifest,
        "slices": [asdict(entry) for entry in slices],
        "aliases": names,
        "size": sum(sizes.values()),
        "events": events,
    }

    def tables() -> Iterable[Any]:
        metrics = version.manifest.metrics
        facts = {
            "version": version.number,
            "aliases": ", ".join(found["aliases"]),
            **{name: manifest[name] for name in ("created", "parent", "kind", "experience", "reason")},
            "verdict": f"{'passed' if version.passed else 'refused'}: {version.manifest.summary}".rstrip(": "),
            **_named(version.manifest.records, "{} records"),
            "average accuracy": metrics.average_accuracy,
            "beyond its records": base_words(metrics),
            "classes": ", ".join(version.manifest.classes),
            **{name: manifest[name] for name in ("module", "consumed")},
            "offset": brief(version.manifest.offset) if version.manifest.offset else None,
            **_named({k: v for k, v in version.manifest.seconds.items() if k not in PARTS}, "seconds to {}"),
            "time": spent(version.manifest.seconds),
            "code": manifest["code"],
            "configuration": "" if arguments.config else "--config shows it",
            "size": f"{_size(found['size'])} in {len(sizes)} files",
        }
        yield _table(["", ""], [[name, value] for name, value in facts.items() if value not in (None, "", {})])
        if arguments.config:
            yield yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True).rstrip()
        if metrics.accuracy:
            examples = {entry.name: entry.examples for entry in slices}
            rows = [[name, examples.get(name), percent(value)] for name, value in metrics.accuracy.items()]
            yield _table(["slice", "examples", "accuracy"], rows, right=("examples", "accuracy"))
        if events:
            columns = ["time", "action", "from", "to", "reason", "by"]
            yield _table(columns, [[event.get(column) for column in columns] for event in events])

    _print(arguments, found, tables)
    return 0


def _promote(registry: Registry, arguments: argparse.Namespace) -> int:
    before = registry.aliases if not arguments.force else {}  # --force is for damaged aliases, too: do not read them
    version = registry.promote(
        arguments.version, arguments.reason, verify=not arguments.no_verify, force=arguments.force
    )
    already = before.get("production") == version.number
    words = f"version {version.number} is {'already ' if already else ''}in production"
    _print(arguments, {"aliases": registry.aliases}, lambda: [words])
    return 0


def _rollback(registry: Registry, arguments: argparse.Namespace) -> int:
    version = registry.rollback(arguments.reason, discard=arguments.discard)
    event = registry.events[-1]
    words = f"version {version.number} is in production again, in place of {event['from']}"
    records = registry.unlearned(version, event["from"])
    if records:
        fate = (
            "go to quarantine before the next update"
            if arguments.discard
            else "are pending again: the next update learns them, once more arrive"
        )
        words += f"; the {records:,} records that it had not learned {fate}"
    _print(arguments, {"aliases": registry.aliases, "event": event, "records": records}, lambda: [words])
    return 0


def _diff(registry: Registry, arguments: argparse.Namespace) -> int:
    found = registry.diff(arguments.a, arguments.b)
    sides = [f"version {found['a']}", f"version {found['b']}"]

    def tables() -> Iterable[Any]:
        for part in ("manifest", "records", "metrics", "seconds", "config"):
            if found[part]:
                rows = [[name, *pair, _change(*pair)] for name, pair in found[part].items()]
                yield _table([part, *sides, "change"], rows, right=("change",))
        classes = [[sign, name] for sign in ("added", "removed") for name in found["classes"][sign]]
        if classes:
            yield _table(["classes", ""], classes)
        files = [
            [name, *(UNKNOWN if size is None else _size(size) for size in pair), sign]
            for sign in ("added", "removed", "changed")
            for name, pair in found["files"][sign].items()
        ]
        total = ["all files", *map(_size, found["size"]), f"{found['files']['unchanged']} unchanged"]
        yield _table(["files", *sides, "change"], [*files, total], right=sides)

    _print(arguments, found, tables)
    return 0


def _verify(registry: Registry, arguments: argparse.Namespace) -> int:
    findings = registry.inspect(arguments.version)
    rows = [[finding.version or finding.part, "yes" if finding.usable else "no", finding.words] for finding in findings]
    found = {
        "sound": not findings,
        "problems": [
            {"version": finding.version, "usable": finding.usable, "problem": finding.words} for finding in findings
        ],
    }
    sound = "the registry is sound" if arguments.version is None else f"version {arguments.version} is sound"
    _print(arguments, found, lambda: [_table(["version", "usable", "problem"], rows) if findings else sound])
    return 1 if findings else 0


def _gc(registry: Registry, arguments: argparse.Namespace) -> int:
    settings = {"keep": arguments.keep, "stale_days": arguments.stale_days}
    try:
        garbage = registry.garbage(**settings) if arguments.dry_run else registry.collect(**settings)
    except LeaseHeld as error:
        hint = "a watch deletes old versions itself if its settings say so, as in watch: {retention: 5}"
        raise RegistryError(f"{error}. {hint}") from error
    size = sum(entry.size for entry in garbage)
    found = {
        "dry_run": arguments.dry_run,
        "size": size,
        "deleted": [{"name": entry.name, "size": entry.size, "why": entry.why} for entry in garbage],
    }

    def tables() -> Iterable[Any]:
        if garbage:
            rows = [[entry.name, _size(entry.size), entry.why] for entry in garbage]
            yield _table(["would be deleted" if arguments.dry_run else "deleted", "size", "why"], rows, right=("size",))
        yield f"{_size(size)} {'would be freed' if arguments.dry_run else 'freed'}" if garbage else "nothing to delete"

    _print(arguments, found, tables)
    return 0


def _repair(registry: Registry, arguments: argparse.Namespace) -> int:
    done = registry.repair()
    _print(arguments, {"repaired": done}, lambda: done or ["the journal is sound"])
    return 0


_ACTIONS = {
    "list": _list,
    "show": _show,
    "promote": _promote,
    "rollback": _rollback,
    "diff": _diff,
    "verify": _verify,
    "gc": _gc,
    "repair": _repair,
}


def _print(arguments: argparse.Namespace, found: Any, tables: Any) -> None:
    """Print JSON for machines, or tables and lines for people; ``tables`` is only called in the second case."""
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    screen = console()
    for number, part in enumerate(tables()):
        if number:
            screen.print()
        screen.print(part)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> Listing:
    from evertune.reports.listing import Listing

    return Listing(columns, [[foreign(_text(value)) for value in row] for row in rows], right)


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _named(values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    return {pattern.format(name.replace("_", " ")): value for name, value in values.items()}


def _change(a: Any, b: Any) -> str:
    """The signed difference of two numbers; empty for equal numbers and for other values."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (a, b)):
        return ""
    return f"{b - a:+.4g}" if a != b else ""


def _points(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:+.1f}"


def _size(size: float) -> str:
    """A number of bytes in a readable unit.

    Example:
        >>> _size(999), _size(92_000_000)
        ('999 B', '92.0 MB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
