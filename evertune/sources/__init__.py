"""Sources of records: folders, Kafka, Redis, SQL and logs of requests, with their schema, masking and labels."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.sources.base import Source as Source
    from evertune.sources.base import SourceError as SourceError
    from evertune.sources.combined import CombinedSource as CombinedSource
    from evertune.sources.folder import FolderSource as FolderSource
    from evertune.sources.kafka import KafkaSource as KafkaSource
    from evertune.sources.labels import LabelJoin as LabelJoin
    from evertune.sources.masking import Masker as Masker
    from evertune.sources.masking import PatternMasker as PatternMasker
    from evertune.sources.masking import PresidioMasker as PresidioMasker
    from evertune.sources.redis import RedisSource as RedisSource
    from evertune.sources.requests import RequestLogSource as RequestLogSource
    from evertune.sources.schema import RecordSchema as RecordSchema
    from evertune.sources.sql import SQLSource as SQLSource

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.sources.base": "Source SourceError",
        "evertune.sources.combined": "CombinedSource",
        "evertune.sources.folder": "FolderSource",
        "evertune.sources.kafka": "KafkaSource",
        "evertune.sources.labels": "LabelJoin",
        "evertune.sources.masking": "Masker PatternMasker PresidioMasker",
        "evertune.sources.redis": "RedisSource",
        "evertune.sources.requests": "RequestLogSource",
        "evertune.sources.schema": "RecordSchema",
        "evertune.sources.sql": "SQLSource",
    },
)
