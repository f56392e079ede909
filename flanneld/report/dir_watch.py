"""A hint that something happened in a directory. What happened, the caller reads himself."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

from flanneld.inotify import Inotify, On

log = logging.getLogger(__name__)

_EVENTS = (
    On.MODIFY
    | On.ATTRIB
    | On.CLOSE_WRITE
    | On.MOVED_FROM
    | On.MOVED_TO
    | On.CREATE
    | On.DELETE
    | On.DELETE_SELF
    | On.MOVE_SELF
    | On.ONLYDIR
)


class DirectoryWatch:
    """One-shot hints about one directory, see ``Inotify``.

    Args:
        directory: need not exist yet, may vanish and come back as another one.
        hint: called from the event loop.
    """

    def __init__(self, directory: Path, hint: Callable[[], None]) -> None:
        self._directory = directory
        self._hint = hint
        self._watch = -1
        self._told = False
        self._inotify: Inotify | None = None
        try:
            self._inotify = Inotify()
        except OSError as exc:
            self._refused(exc)

    def arm(self) -> bool:
        """Forget what happened so far and watch the directory that has the name now.

        Returns:
            Whether a hint will come; False without inotify or without the directory.
        """
        if self._inotify is None:
            return False
        watch = -1
        try:
            watch = self._inotify.watch(self._directory, _EVENTS)
        except OSError as exc:
            self._refused(exc)
        if watch != self._watch and self._watch >= 0:
            # the old directory was renamed away or covered by a mount; if deleted, this fails and may
            self._inotify.unwatch(self._watch)
        self._watch = watch
        self._inotify.arm(self._hint)
        return watch >= 0

    def close(self) -> None:
        """Stop watching."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _refused(self, refusal: OSError) -> None:
        """Say it once; a directory that is not there is no news, its owner is about to make it."""
        if refusal.errno not in (errno.ENOENT, errno.ENOTDIR) and not self._told:
            self._told = True
            log.warning(
                "files are checked by timer only, raise the fs.inotify limits directory=%s reason=%s",
                self._directory,
                refusal.strerror,
            )
