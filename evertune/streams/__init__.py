"""Experiences, streams of experiences, and their batches."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.streams.avalanche import from_avalanche as from_avalanche
    from evertune.streams.datamodule import ExperienceDataModule as ExperienceDataModule
    from evertune.streams.datamodule import StreamDataModule as StreamDataModule
    from evertune.streams.experience import Experience as Experience
    from evertune.streams.experience import ExperienceStream as ExperienceStream
    from evertune.streams.rewriting import BackTranslation as BackTranslation
    from evertune.streams.rewriting import Synonyms as Synonyms
    from evertune.streams.rewriting import augment as augment
    from evertune.streams.sampler import BucketSampler as BucketSampler
    from evertune.streams.sampler import ResumableLoader as ResumableLoader
    from evertune.streams.splits import SourceOptions as SourceOptions
    from evertune.streams.splits import class_incremental as class_incremental
    from evertune.streams.splits import data_incremental as data_incremental
    from evertune.streams.splits import domain_incremental as domain_incremental
    from evertune.streams.splits import time_incremental as time_incremental
    from evertune.streams.tables import BadRow as BadRow

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.streams.avalanche": "from_avalanche",
        "evertune.streams.datamodule": "ExperienceDataModule StreamDataModule",
        "evertune.streams.experience": "Experience ExperienceStream",
        "evertune.streams.rewriting": "BackTranslation Synonyms augment",
        "evertune.streams.sampler": "BucketSampler ResumableLoader",
        "evertune.streams.splits": (
            "SourceOptions class_incremental data_incremental domain_incremental time_incremental"
        ),
        "evertune.streams.tables": "BadRow",
    },
)
