"""JSON that people write: the network configuration and its ``Backend`` object, read the way Go reads it.

Keys match case-insensitively and the last of several wins (contract 2.2), which is why this is the stdlib's
decoder and not msgspec: it hands over the pairs. Any bad text ends in a ConfigError, never in anything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

from flanneld.errors import ConfigError


def decode_object(raw: bytes | str, what: str) -> dict[str, object]:
    """Decode one JSON object, its keys in the order in which they were last written.

    Args:
        raw: the text; bytes are UTF-8.
        what: for the sentence, ``the network configuration``.

    Raises:
        ConfigError: not JSON, or JSON but not an object.
    """
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        value: object = json.loads(text, object_pairs_hook=_last_wins, parse_constant=_refuse, parse_float=_number)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{what} is not JSON ({error.msg} at line {error.lineno} column {error.colno}): correct it there"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text (byte {error.start}): write it again as plain JSON") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number that cannot be used"
        raise ConfigError(f"{what} is not usable JSON ({why}): write it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{what} is {shown(value)}: write a JSON object such as {{"Network": "10.5.0.0/16"}}')
    return value


def encode_object(value: dict[str, object]) -> bytes:
    """The object as JSON bytes that ``decode_object`` takes."""
    return json.dumps(value).encode()


def wrong(key: str, value: object, remedy: str) -> ConfigError:
    """The error for a key whose value cannot be used: ``SubnetLen is 31: use a number from 18 to 30``."""
    return ConfigError(f"{key} is {shown(value)}: {remedy}")


def shown(value: object) -> str:
    """A value from JSON as it is shown in sentences, short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _last_wins(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """A dict whose order tells which spelling of a key came last."""
    found: dict[str, object] = {}
    for key, value in pairs:
        found.pop(key, None)
        found[key] = value
    return found


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(text)
    return number


def _refuse(_name: str) -> NoReturn:
    """NaN and Infinity, which Python's decoder takes and JSON does not have."""
    raise ValueError
