"""The differences between two versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evertune.registry.version import Version, version_folder
from evertune.utils.typed_json import SEAL


def differences(one: Version, two: Version) -> dict[str, Any]:
    """The differences between two versions of a registry.

    Returns:
        ``a`` and ``b``: the numbers. ``manifest``, ``records``, ``metrics``, ``seconds`` and ``config``: the pairs
        of values that differ, by name (nested names joined by dots), with None for a missing value; ``records`` and
        ``metrics`` list all values. ``classes``: the names ``added`` and ``removed``. ``files``: the pairs of sizes
        of files ``added``, ``removed`` and ``changed``, by name, and the number ``unchanged``. ``size``: the pair
        of total sizes in bytes.
    """
    first, second = one.manifest.to_dict(), two.manifest.to_dict()
    sizes = one.store.sizes(version_folder(one.number)), two.store.sizes(version_folder(two.number))
    plain = [
        name
        for name in first
        if name not in ("version", "slices_digest", SEAL)
        and not any(isinstance(side[name], dict | list) for side in (first, second))
    ]
    files: dict[str, Any] = {"added": {}, "removed": {}, "changed": {}, "unchanged": 0}
    for name in sorted({**first["files"], **second["files"]}):
        hashes = first["files"].get(name), second["files"].get(name)
        if hashes[0] == hashes[1]:
            files["unchanged"] += 1
            continue
        kind = "added" if hashes[0] is None else "removed" if hashes[1] is None else "changed"
        files[kind][name] = [size.get(name) for size in sizes]
    classes = first["classes"], second["classes"]
    return {
        "a": one.number,
        "b": two.number,
        "manifest": _changes({name: first[name] for name in plain}, {name: second[name] for name in plain}),
        "records": _changes(first["records"], second["records"], all_of_them=True),
        "metrics": _changes(first["metrics"], second["metrics"], all_of_them=True),
        "seconds": _changes(first["seconds"], second["seconds"]),
        "config": _changes(first["config"], second["config"]),
        "classes": {
            "added": [name for name in classes[1] if name not in classes[0]],
            "removed": [name for name in classes[0] if name not in classes[1]],
        },
        "files": files,
        "size": [sum(size.values()) for size in sizes],
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names.

    Example:
        >>> _flat({"trainer": {"devices": 2}, "seed": 0})
        {'trainer.devices': 2, 'seed': 0}
    """
    if not isinstance(value, Mapping):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _changes(a: Any, b: Any, all_of_them: bool = False) -> dict[str, list[Any]]:
    """The pairs of values that differ, by name."""
    first, second = _flat(a), _flat(b)
    pairs = {name: [first.get(name), second.get(name)] for name in dict.fromkeys((*first, *second))}
    return {name: pair for name, pair in pairs.items() if all_of_them or pair[0] != pair[1]}
