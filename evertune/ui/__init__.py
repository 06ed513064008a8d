"""A small web page over a registry: its versions, its records, its updates, and with permission their changes."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.ui.app import application as application
    from evertune.ui.settings import UiSettings as UiSettings

__all__, __getattr__, __dir__ = face(__name__, {"evertune.ui.app": "application", "evertune.ui.settings": "UiSettings"})
