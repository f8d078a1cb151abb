"""Who is told of what a cache does: the observer that it was given, and those of plugins."""

import logging
from collections.abc import Callable

from kvtiers.errors import KVTiersError
from kvtiers.events import Event
from kvtiers.plugins import registry

_log = logging.getLogger("kvtiers")


class Observers:
    """Tells a cache's own observer, and those of plugins, of every event. Their errors are logged, not raised; Ctrl-C
    still stops.

    It is false while nobody listens, so that an event need not even be made.
    """

    def __init__(self, own: Callable[[Event], None] | None) -> None:
        if own is not None and not callable(own):
            raise KVTiersError(f"observe is called with every event; got {own!r}, which cannot be called")
        self.own = own

    def __bool__(self) -> bool:
        return self.own is not None or registry().observers_active()

    def __call__(self, event: Event) -> None:
        if self.own is not None:
            try:
                self.own(event)
            except (Exception, SystemExit):  # noqa: BLE001 - an observer never breaks generation
                _log.warning("observer %r failed and is not called again", self.own, exc_info=True)
                self.own = None
        registry().observe(event)
