"""Certificates that are about to end are told of in time (failures F28)."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from flanneld.duties.expiry import TELL_EVERY_S, WARN_DAYS, ExpiryWatch
from flanneld.sources.cert_expiry import first_ends, last_ends, not_after

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
CA = trustme.CA()


def certificate(ends: datetime) -> bytes:
    return (
        CA.issue_cert("client.example", not_before=NOW - timedelta(days=400), not_after=ends).cert_chain_pems[0].bytes()
    )


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


class Watched:
    """A host with certificates, and what it says of them."""

    def __init__(self, directory: Path, ends: datetime) -> None:
        self.cert, self.ca = directory / "client.crt", directory / "ca.crt"
        self.cert.write_bytes(certificate(ends))
        self.ca.write_bytes(CA.cert_pem.bytes())
        self.clock = Clock()
        self.said: list[Sequence[str]] = []
        self.watch = ExpiryWatch(str(self.ca), str(self.cert), self.said.append, self.clock)

    def look(self) -> str | None:
        self.watch.look()
        return "; ".join(self.said[-1]) or None


@pytest.mark.parametrize("ends", [datetime(2026, 12, 3, 23, 59, 59, tzinfo=UTC), datetime(2057, 1, 2, tzinfo=UTC)])
def test_the_end_of_a_certificate_is_read_in_both_forms_of_time(ends: datetime, tmp_path: Path) -> None:
    file = tmp_path / "c.pem"
    file.write_bytes(b"a comment\n" + certificate(ends))
    assert first_ends(file) == ends


def test_of_several_cas_the_one_that_lasts_longest_counts_and_of_a_chain_the_first(tmp_path: Path) -> None:
    early, late = NOW + timedelta(days=1), NOW + timedelta(days=99)
    file = tmp_path / "bundle.pem"
    file.write_bytes(certificate(early) + certificate(late))
    assert (first_ends(file), last_ends(file)) == (early, late)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n", b"\xff"])
def test_what_is_no_certificate_has_no_end(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.pem"
    file.write_bytes(content)
    assert first_ends(file) is None
    assert last_ends(tmp_path / "none") is None


DER = ssl.PEM_cert_to_DER_cert(certificate(NOW).decode())


@given(st.integers(0, 200), st.binary(max_size=8))
def test_a_damaged_certificate_is_refused_and_nothing_worse(at: int, junk: bytes) -> None:
    try:
        not_after(DER[:at] + junk + DER[at + len(junk) :])
        not_after(DER[:at] + junk)
    except ValueError:
        pass


def test_one_that_lasts_is_not_spoken_of(tmp_path: Path) -> None:
    assert Watched(tmp_path, NOW + timedelta(days=WARN_DAYS, minutes=1)).look() is None


def test_one_that_ends_soon_is_named_with_file_day_and_remedy(tmp_path: Path) -> None:
    host = Watched(tmp_path, NOW + timedelta(days=12, hours=1))
    assert host.look() == (
        f"our client certificate --etcd-certfile {host.cert} ends in 12 days, on 2026-12-03 13:00 UTC: "
        "put its successor there, no restart is needed"
    )
    host.clock.now += timedelta(days=13)
    assert " ended on 2026-12-03 13:00 UTC: " in str(host.look())
    host.cert.write_bytes(certificate(NOW + timedelta(days=365)))
    assert host.look() is None


def test_the_log_has_it_once_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = Watched(tmp_path, NOW + timedelta(days=9))
    for _hour in range(48):
        host.look()
        host.clock.now += timedelta(seconds=TELL_EVERY_S / 24)
    assert len(caplog.messages) == 2
