"""What a host finds where its memory of leases should lie, and what comes of it (failures F17)."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flanneld.model.lease import Lease
from flanneld.model.lease_codec import decode_attrs, parse_key
from flanneld.model.remembered import Header
from flanneld.report.lease_cache import LeaseCache

NETWORK, IDENTITY = "/coreos.com/network", "a" * 32
LEASES = {
    key: Lease(*parse_key(key.encode()), decode_attrs(b'{"PublicIP":"192.0.2.%d"}' % number))
    for number, key in enumerate(("10.5.2.0-24", "10.5.9.0-24"), 2)
}
HEADER = Header(
    network=NETWORK,
    identity=IDENTITY,
    boot="b",
    saved=1.7e9,
    store="17",
    config='{"Network":"10.5.0.0/16"}',
    own="10.5.2.0-24",
    expires=None,
    leases=0,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.cache"


@pytest.fixture
def cache(path: Path) -> LeaseCache:
    return LeaseCache(path, NETWORK, IDENTITY)


def test_what_was_kept_is_recalled_and_only_root_may_read_it(cache: LeaseCache, path: Path) -> None:
    assert cache.keep(HEADER, LEASES)
    found = cache.recall()
    assert found is not None
    assert found.leases().keys() == LEASES.keys()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_terabyte(path: Path) -> None:
    os.truncate(path, 1 << 40)


def half_of_it(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [a_pipe, a_device, a_directory, a_terabyte, half_of_it, nothing])
async def test_whatever_lies_in_its_place_is_set_aside_and_the_next_memory_is_written(
    cache: LeaseCache, path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache.keep(HEADER, LEASES)
    harm(path)
    assert await asyncio.wait_for(asyncio.to_thread(cache.recall), 5) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert cache.keep(HEADER, LEASES)
    assert cache.recall() is not None


def test_a_memory_behind_a_link_is_used(cache: LeaseCache, path: Path) -> None:
    cache.keep(HEADER, LEASES)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    assert cache.recall() is not None


def test_a_dangling_link_is_no_memory(cache: LeaseCache, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.symlink_to("nowhere")
    assert cache.recall() is None
    assert caplog.text == ""


def of_everybody(path: Path) -> None:
    path.chmod(0o666)


def of_another_user(path: Path) -> None:
    os.chown(path, 65534, 65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("harm", [of_everybody, of_another_user])
def test_a_memory_that_other_users_may_have_written_is_not_used_and_the_next_one_is_ours(
    cache: LeaseCache, path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever writes it says where this host's packets go."""
    cache.keep(HEADER, LEASES)
    harm(path)
    assert cache.recall() is None
    [line] = caplog.messages
    assert "chown root" in line
    assert "chmod 600" in line
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no file more at each start"
    cache.keep(HEADER, LEASES)
    assert cache.recall() is not None


def test_a_newer_format_is_kept_under_its_number_and_told(
    cache: LeaseCache, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """design/adr-0012; whatever a later version does about checksums."""
    path.write_bytes(msgspec.json.encode({"kind": "flanneld-cache", "version": 7, "more": []}) + b"\nrows\n")
    assert cache.recall() is None
    assert path.with_name(path.name + ".format-7").exists()
    assert "a newer flanneld wrote it" in caplog.text


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (LeaseCache(Path(), "/other", IDENTITY), "belongs to the network"),
        (LeaseCache(Path(), NETWORK, "b" * 32), "another machine"),
    ],
)
def test_the_memory_of_another_network_or_machine_is_not_ours(
    cache: LeaseCache, path: Path, other: LeaseCache, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.keep(HEADER, LEASES)
    assert LeaseCache(path, other.network_id, other.identity).recall() is None
    assert told in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_memory_that_cannot_be_written_is_told_once_and_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path.mkdir()  # a rename onto a directory fails, for root too
    (path / "in it").touch()
    cache = LeaseCache(path, NETWORK, IDENTITY)
    assert not cache.keep(HEADER, LEASES)
    assert not cache.keep(HEADER, LEASES)
    assert len(caplog.messages) == 1
    (path / "in it").unlink()
    path.rmdir()
    assert cache.keep(HEADER, LEASES)
    assert "are remembered again" in caplog.messages[-1]
