"""Whatever bytes come, every reader of foreign bytes takes them or refuses them with its own error, soon."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CORPUS, TARGETS

LONGEST_S = 2.0
"""For one input, on a busy machine; quadratic readers take minutes."""


def kept() -> Iterator[tuple[str, bytes]]:
    for name, target in TARGETS.items():
        yield from ((name, seed) for seed in target.seeds)
        yield from ((name, path.read_bytes()) for path in sorted((CORPUS / name).glob("*")))


@pytest.mark.parametrize(("name", "raw"), list(kept()))
def test_what_once_went_wrong_goes_well(name: str, raw: bytes) -> None:
    begun = time.monotonic()
    TARGETS[name].call(raw)
    assert time.monotonic() - begun < LONGEST_S


PIECES = [
    b"",
    b"\0",
    b"\n",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\x1b[2J",
    b'"',
    b"{",
    b"]",
    b"-1",
    b"1e999",
    b"9" * 5000,
]


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A good input with a few places changed, cut, doubled, nested or blown up."""
    raw = bytearray(draw(st.sampled_from(TARGETS[name].seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        to = draw(st.integers(at, min(len(raw), at + 30)))
        piece = draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(PIECES),
                st.integers(0, 4000).map(lambda n: b"[" * n),
                st.just(bytes(raw[at:to]) * 3),
            )
        )
        raw[at:to] = piece
    return bytes(raw)


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_ends_in_an_error_of_another_kind(name: str) -> None:
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
    @given(st.one_of(st.binary(max_size=300), damaged(name)))
    def attempt(raw: bytes) -> None:
        TARGETS[name].call(raw)

    attempt()
