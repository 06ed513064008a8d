"""Where the data come from: experiences, streams of them, and the batches they become."""

from evertune.streams.datamodule import ExperienceDataModule, StreamDataModule
from evertune.streams.experience import Experience, ExperienceStream
from evertune.streams.sampler import BucketSampler, ResumableLoader
from evertune.streams.sources import BadRow
from evertune.streams.splits import (
    SourceOptions,
    class_incremental,
    data_incremental,
    domain_incremental,
    time_incremental,
)

__all__ = [
    "BadRow",
    "BucketSampler",
    "Experience",
    "ExperienceDataModule",
    "ExperienceStream",
    "ResumableLoader",
    "SourceOptions",
    "StreamDataModule",
    "class_incremental",
    "data_incremental",
    "domain_incremental",
    "time_incremental",
]
