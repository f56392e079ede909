"""The network configuration as a file, which is what a mounted ConfigMap is (contract 9.5)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flanneld.errors import ConfigError

log = logging.getLogger("flanneld.kube")

_MAX_BYTES = 1 << 20
"""Largest content of a ConfigMap. Source: Kubernetes ``core/validation``, MaxSecretSize."""


class ConfigFile:
    """One file, followed by its content.

    The kubelet swaps a symbolic link above it, up to a minute after the ConfigMap changed, so looking each second
    costs less than explaining inotify on a moving directory, and finds editors' and scripts' ways of writing too.

    Args:
        path: ``--net-config-path``.
        look_s: seconds between two looks.
    """

    def __init__(self, path: str, *, look_s: float = 1.0) -> None:
        self._path = Path(path)
        self._look_s = look_s
        self._stamp: object = None
        self._content: bytes | None = None

    def read(self) -> bytes:
        """The present content.

        Raises:
            ConfigError: there is none.
        """
        try:
            self._stamp = self._now()
            with self._path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"network configuration {self._path} cannot be read ({error.strerror}): mount the ConfigMap there, or "
                "name the file by --net-config-path"
            ) from error
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"network configuration {self._path} has more than 1 MiB: write less")
        self._content = content
        return content

    async def follow(self, changed: Callable[[bytes], None]) -> None:
        """Call ``changed`` with each content that is another than the last one read, for ever."""
        told = ""
        while True:
            await asyncio.sleep(self._look_s)
            before = self._content
            try:
                if self._now() == self._stamp:
                    continue
                content = self.read()
            except (OSError, ConfigError) as error:
                if str(error) != told:
                    log.warning("network configuration cannot be read, keeping the one we have reason=%s", error)
                    told = str(error)
                self._stamp = None
            else:
                told = ""
                if content != before:
                    changed(content)

    def _now(self) -> object:
        stat = os.stat(self._path)
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev
