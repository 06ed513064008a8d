"""Where the data come from: experiences, streams of them, and the batches they become."""

from evertune.streams.datamodule import ExperienceDataModule, StreamDataModule
from evertune.streams.experience import Experience, ExperienceStream
from evertune.streams.folder import FolderSource
from evertune.streams.kafka import KafkaSource
from evertune.streams.labels import LabelJoin
from evertune.streams.masking import Masker, PatternMasker, PresidioMasker
from evertune.streams.redis import RedisSource
from evertune.streams.sampler import BucketSampler, ResumableLoader
from evertune.streams.schema import RecordSchema
from evertune.streams.source import Source, SourceError
from evertune.streams.sources import BadRow
from evertune.streams.splits import (
    SourceOptions,
    class_incremental,
    data_incremental,
    domain_incremental,
    time_incremental,
)
from evertune.streams.sql import SQLSource

__all__ = [
    "BadRow",
    "BucketSampler",
    "Experience",
    "ExperienceDataModule",
    "ExperienceStream",
    "FolderSource",
    "KafkaSource",
    "LabelJoin",
    "Masker",
    "PatternMasker",
    "PresidioMasker",
    "RecordSchema",
    "RedisSource",
    "ResumableLoader",
    "SQLSource",
    "Source",
    "SourceError",
    "SourceOptions",
    "StreamDataModule",
    "class_incremental",
    "data_incremental",
    "domain_incremental",
    "time_incremental",
]
