"""The names of parameters, whatever wraps the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that ``torch.compile``, DDP, FSDP and activation checkpointing add."""


def matched(old: Iterable[str], new: Iterable[str]) -> dict[str, str]:
    """The new name of every old one: the same, or the same but for wrappers. Names that match none are left out.

    Example:
        >>> matched(["net.weight", "net.bias", "head.weight"], ["net._orig_mod.weight", "net.bias"])
        {'net.weight': 'net._orig_mod.weight', 'net.bias': 'net.bias'}
    """
    old, new = list(old), list(new)
    bare = {name: _bare(name) for name in {*old, *new}}
    counts = Counter(bare[name] for name in new)
    by_bare = {bare[name]: name for name in new if counts[bare[name]] == 1}
    same = set(new)
    found = {name: name if name in same else by_bare.get(bare[name]) for name in old}
    return {name: there for name, there in found.items() if there is not None}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
