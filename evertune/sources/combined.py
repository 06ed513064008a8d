"""Several sources read as one."""

from __future__ import annotations

from collections.abc import Mapping

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError


class CombinedSource(Source):
    """Reads several sources, such as a stream of labelled records and the log of requests.

    The records of all must fit one schema. Each keeps its own offset, under its name: a source may be added later, and
    is then read from its beginning; one that is taken out resumes where it was if it comes back. A chunk is divided
    among the sources, so that one with much to read does not hold up the others. If one cannot be read, none is.

    Args:
        sources: The sources by name, as they stand in offsets.

    Raises:
        ValueError: If there is no source.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from evertune.sources import CombinedSource, FolderSource
        >>> folders = {name: Path(mkdtemp()) for name in ("tickets", "reviews")}
        >>> for name, folder in folders.items():
        ...     _ = (folder / f"{name}.jsonl").write_text('{"text": "my card is lost"}\\n')
        >>> source = CombinedSource({name: FolderSource(str(folder)) for name, folder in folders.items()})
        >>> chunk = source.read(None, limit=100)
        >>> [record.origin for record in chunk.records], list(chunk.offset)
        (['tickets.jsonl:1', 'reviews.jsonl:1'], ['tickets', 'reviews'])
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        if not sources:
            raise ValueError("sources is empty: name at least one")
        self.sources = dict(sources)

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records of each source, at most ``limit`` in all.

        Raises:
            ValueError: If ``limit`` is below 1.
            SourceError: If a source cannot be read; the message begins with its name.
        """
        if limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        after = dict(offset or {})
        records: list[Incoming] = []
        for number, (name, source) in enumerate(self.sources.items()):
            left = len(self.sources) - number
            if room := -(-(limit - len(records)) // left):
                try:
                    chunk = source.read(after.get(name), room)
                except SourceError as error:
                    raise SourceError(f"{name}: {error}") from error
                records += chunk.records
                after[name] = chunk.offset
        return Chunk(records, after)

    def commit(self, offset: Offset) -> None:
        for name, source in self.sources.items():
            if name in offset:
                source.commit(offset[name])

    def close(self) -> None:
        for source in self.sources.values():
            source.close()

    def __str__(self) -> str:
        return " and ".join(map(str, self.sources.values()))
