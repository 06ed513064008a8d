"""What the pages show, and whether they may change it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from evertune.registry.registry import Registry


@dataclass(frozen=True, kw_only=True)
class UiSettings:
    """The settings of ``evertune ui``.

    Args:
        registry: Folder of the registry, or its URL.
        allow_changes: Whether pages may promote, roll back, have records checked again, and label them. Default: they
            only show.
        live: YAML file of ``evertune update``. Records in quarantine are checked again under its schema, by the command
            ``evertune quarantine retry``.
        work_dir: Folder of the update in progress, if it is not inside the registry.
        queue: File that ``evertune review choose`` has written.
        watch: Address of a running ``evertune watch`` with a port, such as ``http://127.0.0.1:9090``. Its health and
            its readings of drift are shown.

    Raises:
        ValueError: If ``watch`` is not the address of a web server.
    """

    registry: str
    allow_changes: bool = False
    live: str | None = None
    work_dir: str | None = None
    queue: str | None = None
    watch: str | None = None

    def __post_init__(self) -> None:
        if self.watch is not None and urlsplit(self.watch).scheme not in ("http", "https"):
            raise ValueError(f"watch must be an address such as http://127.0.0.1:9090, got {self.watch!r}")

    def staging(self, registry: Registry) -> Path | None:
        """The folder of the update in progress; None if it is on another machine."""
        if self.work_dir is not None:
            return Path(self.work_dir)
        return registry.store.local("staging") if registry.store.is_local else None
