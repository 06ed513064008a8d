"""The weights as each rank holds them, and state about the weights."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.shards.opened import frozen_shards_of as frozen_shards_of
    from evertune.shards.opened import shards_of as shards_of
    from evertune.shards.replicated import ReplicatedShards as ReplicatedShards
    from evertune.shards.shards import Fragment as Fragment
    from evertune.shards.shards import ParameterShards as ParameterShards
    from evertune.shards.support import check_strategy as check_strategy

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.shards.opened": "frozen_shards_of shards_of",
        "evertune.shards.replicated": "ReplicatedShards",
        "evertune.shards.shards": "Fragment ParameterShards",
        "evertune.shards.support": "check_strategy",
    },
)
