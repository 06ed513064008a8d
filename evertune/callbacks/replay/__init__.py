"""Experience replay: past examples are mixed into every training batch."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.callbacks.replay.callback import Replay as Replay

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.callbacks.replay.callback": "Replay",
    },
)
