"""The ``Backend`` object of the network configuration, as a backend reads its own keys.

Keys match case-insensitively, the last of several wins and null means the default (contract 2.2). What a
backend never asks for is left over in ``unknown``, so that it can say so in one line.
"""

from __future__ import annotations

from flanneld.errors import ConfigError
from flanneld.model.conf_json import decode_object, wrong


class BackendConf:
    """Typed access to the keys of one ``Backend`` object.

    Args:
        raw: ``NetConf.backend``, a JSON object.

    Raises:
        ConfigError: not a JSON object.
    """

    def __init__(self, raw: bytes | str) -> None:
        self._names: dict[str, str] = {}
        self._values: dict[str, object] = {}
        for name, value in decode_object(raw, "Backend").items():
            if value is not None:
                self._names[name.lower()] = name
                self._values[name.lower()] = value
        self._asked = {"type"}

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number.

        Args:
            key: in its documented spelling.
            default: when the key is absent; need not lie in the range.
            low: smallest value accepted.
            high: largest value accepted.

        Raises:
            ConfigError: another type (24.0 and "24" are not whole numbers) or outside the range.
        """
        value = self._ask(key, default)
        if value is default:
            return default
        if type(value) is not int or not low <= value <= high:
            raise wrong(f"Backend.{key}", value, f"use a number from {low} to {high}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """``true`` or ``false``.

        Raises:
            ConfigError: another type.
        """
        value = self._ask(key, default)
        if not isinstance(value, bool):
            raise wrong(f"Backend.{key}", value, "use true or false")
        return value

    def text(self, key: str, default: str, secret: bool = False) -> str:
        """A string; a secret one is never shown.

        Raises:
            ConfigError: another type.
        """
        value = self._ask(key, default)
        if isinstance(value, str):
            return value
        if secret:
            raise ConfigError(f"Backend.{key} is not text: put it in double quotes")
        raise wrong(f"Backend.{key}", value, "put it in double quotes")

    def unknown(self) -> tuple[str, ...]:
        """Keys that nobody asked for, as spelt in the configuration; call it after the last getter."""
        return tuple(name for key, name in self._names.items() if key not in self._asked)

    def _ask(self, key: str, default: object) -> object:
        self._asked.add(key.lower())
        return self._values.get(key.lower(), default)
