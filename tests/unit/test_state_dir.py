"""What a host remembers: identity (failure F19), previous subnets, one daemon for each network."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flanneld.errors import ConfigError, KernelError
from flanneld.model.addr import Prefix
from flanneld.model.identity import derive_identity, machine_mark
from flanneld.report.state_dir import StateDir, known_identity

MACHINE = "4c0bd8d5a6b84d0f9f1d6e9b7b8f3a21"
CLONE = "9a3f21d8b5c64e77a1f0c2d3e4f50617"
NETWORK = "/coreos.com/network"
SUBNETS = (Prefix.parse("10.5.72.0/24"), Prefix.parse("fd00:5:72::/64"))


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """/etc/machine-id of this test's machine."""
    file = tmp_path / "etc-machine-id"
    file.write_text(MACHINE + "\n")
    return file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def machine_becomes(etc: Path, machine_id: str) -> None:
    etc.write_text(machine_id + "\n")


class TestIdentity:
    def test_same_after_restart_and_after_loss_of_the_directory(self, path: Path, etc: Path) -> None:
        first = StateDir(path, NETWORK, etc).identity()
        assert StateDir(path, NETWORK, etc).identity() == first
        shutil.rmtree(path)
        assert StateDir(path, NETWORK, etc).identity() == first == derive_identity(MACHINE, str(path))

    def test_same_for_every_network_of_a_host(self, path: Path, etc: Path) -> None:
        assert StateDir(path, "/a", etc).identity() == StateDir(path, "/b", etc).identity()

    def test_moved_directory_keeps_it(self, path: Path, etc: Path) -> None:
        first = StateDir(path, NETWORK, etc).identity()
        moved = path.rename(path.with_name("moved"))
        assert StateDir(moved, NETWORK, etc).identity() == first

    def test_clone_of_a_golden_image_is_another_host_and_says_so(
        self, path: Path, etc: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        origin = StateDir(path, NETWORK, etc)
        origin.remember(*SUBNETS)
        machine_becomes(etc, CLONE)
        clone = StateDir(path, NETWORK, etc)
        assert clone.identity() == derive_identity(CLONE, str(path)) != origin.identity()
        assert clone.previous_subnets() == (None, None)
        assert [r.getMessage() for r in caplog.records if "another machine" in r.getMessage()]
        caplog.clear()
        assert StateDir(path, NETWORK, etc).identity() == clone.identity()
        assert caplog.records == []

    def test_operators_machine_id_overrides_the_systems(self, path: Path, etc: Path) -> None:
        path.mkdir()
        (path / "machine-id").write_text("host-a\n")
        assert StateDir(path, NETWORK, etc).identity() == derive_identity("host-a", str(path))

    @pytest.mark.parametrize("text", ["", "uninitialized\n", None, "\0" * 33, "x" * 10000])
    def test_machine_without_id_keeps_a_made_up_one(
        self, path: Path, etc: Path, text: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        etc.unlink() if text is None else etc.write_text(text)
        first = StateDir(path, NETWORK, etc).identity()
        assert len(caplog.records) == 1
        assert StateDir(path, NETWORK, etc).identity() == first
        assert len(caplog.records) == 1
        # a container without a volume comes back with an empty directory
        shutil.rmtree(path)
        assert StateDir(path, NETWORK, etc).identity() == first

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\0\0\0",
            b"{}",
            b"[1]",
            b'{"kind":"flanneld-identity","identity":"x","machine":"y","version":2}',
            b"\xff",
            b'{"kind":"flanneld-subnets"}',
        ],
    )
    def test_unusable_file_is_set_aside_with_one_warning(
        self, path: Path, etc: Path, text: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = StateDir(path, NETWORK, etc).identity()
        (path / "identity").write_bytes(text)
        assert StateDir(path, NETWORK, etc).identity() == first
        assert len(caplog.records) == 1
        assert (path / "identity.unusable").read_bytes() == text
        assert StateDir(path, NETWORK, etc).identity() == first
        assert len(caplog.records) == 1

    def test_identity_with_bad_characters_is_derived_again(self, path: Path, etc: Path) -> None:
        first = StateDir(path, NETWORK, etc).identity()
        file = path / "identity"
        file.write_text(file.read_text().replace(first, '\\"evil'))
        assert StateDir(path, NETWORK, etc).identity() == first


class TestPreviousSubnets:
    @pytest.mark.parametrize("subnets", [SUBNETS, (SUBNETS[0], None), (None, SUBNETS[1]), (None, None)])
    def test_remembered_over_a_restart(
        self, path: Path, etc: Path, subnets: tuple[Prefix | None, Prefix | None]
    ) -> None:
        StateDir(path, NETWORK, etc).remember(*subnets)
        assert StateDir(path, NETWORK, etc).previous_subnets() == subnets

    def test_nothing_known_at_first(self, path: Path, etc: Path) -> None:
        assert StateDir(path, NETWORK, etc).previous_subnets() == (None, None)

    @pytest.mark.parametrize("other", ["/coreos.com-network", "/other", "coreos.com/network", "/", "../.."])
    def test_networks_of_one_host_do_not_mix(self, path: Path, etc: Path, other: str) -> None:
        StateDir(path, NETWORK, etc).remember(*SUBNETS)
        assert StateDir(path, other, etc).previous_subnets() == (None, None)
        StateDir(path, other, etc).remember(None, None)
        assert StateDir(path, NETWORK, etc).previous_subnets() == SUBNETS
        assert sorted(p.name for p in path.parent.iterdir()) == ["etc-machine-id", "state"]

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("10.5.72.0/24", "10.5.72.0"),
            ("10.5.72.0/24", "fd00::/64"),
            (NETWORK, "/other"),
            ('"version":2', '"version":7'),
            ("}", ""),
        ],
    )
    def test_unusable_file_is_set_aside(
        self, path: Path, etc: Path, old: str, new: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        StateDir(path, NETWORK, etc).remember(*SUBNETS)
        file = next(path.glob("*.json"))
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        state = StateDir(path, NETWORK, etc)
        assert state.previous_subnets() == (None, None)
        assert len(caplog.records) == 1
        state.remember(*SUBNETS)
        assert state.previous_subnets() == SUBNETS


# What version 1 wrote, byte for byte.
IDENTITY_1 = '{{"kind":"flanneld-identity","identity":"{}","machine":"{}","version":1}}\n'
SUBNETS_1 = (
    '{{"kind":"flanneld-subnets","network":"/coreos.com/network","identity":"{}",'
    '"subnet":"10.5.72.0/24","subnet6":"fd00:5:72::/64","version":1}}\n'
)


class TestFormats:
    """Design/adr-0012: versions of this program come and go on one directory."""

    def test_an_older_format_is_understood_and_written_anew(
        self, path: Path, etc: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = StateDir(path, NETWORK, etc)
        identity = state.identity()
        state.remember(*SUBNETS)
        now = {file.name: file.read_bytes() for file in path.iterdir()}
        subnets = next(path.glob("*.json"))
        (path / "identity").write_text(IDENTITY_1.format(identity, machine_mark(MACHINE)))
        subnets.write_text(SUBNETS_1.format(identity))
        caplog.set_level("INFO")
        state = StateDir(path, NETWORK, etc)
        assert (state.identity(), state.previous_subnets()) == (identity, SUBNETS)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == now
        assert [record.getMessage().split(" path=")[0] for record in caplog.records] == [
            "state file brought to the present format"
        ] * 2

    def test_a_newer_format_is_kept_under_another_name_and_harms_nothing(
        self, path: Path, etc: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = StateDir(path, NETWORK, etc)
        identity = state.identity()
        newer = b'{"kind":"flanneld-identity","version":9,"what":{"else":["nobody","knows"]}}'
        for _ in range(2):  # the second downgrade
            (path / "identity").write_bytes(newer)
            assert StateDir(path, NETWORK, etc).identity() == identity
        assert sorted(file.name for file in path.iterdir()) == ["identity", "identity.format-9", "identity.format-9-2"]
        assert (path / "identity.format-9-2").read_bytes() == newer
        assert "a newer flanneld wrote it (format 9, this one knows up to 2)" in caplog.records[0].getMessage()
        assert len(caplog.records) == 2

    def test_a_second_damaged_file_does_not_displace_the_first(self, path: Path, etc: Path) -> None:
        for text in (b"first", b"second"):
            StateDir(path, NETWORK, etc).identity()
            (path / "identity").write_bytes(text)
        StateDir(path, NETWORK, etc).identity()
        assert (path / "identity.unusable").read_bytes() == b"first"
        assert (path / "identity.unusable-2").read_bytes() == b"second"

    def test_a_changed_digit_is_noticed(self, path: Path, etc: Path, caplog: pytest.LogCaptureFixture) -> None:
        StateDir(path, NETWORK, etc).remember(*SUBNETS)
        file = next(path.glob("*.json"))
        file.write_text(file.read_text().replace("10.5.72.0", "10.5.73.0"))
        assert StateDir(path, NETWORK, etc).previous_subnets() == (None, None)
        assert "checksum" in caplog.text

    def test_an_older_file_in_a_directory_that_cannot_be_written_still_counts(
        self, path: Path, etc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.mkdir()
        identity = derive_identity("elsewhere", "/var/lib/flanneld")  # another than would be derived here
        text = IDENTITY_1.format(identity, machine_mark(MACHINE))
        (path / "identity").write_text(text)
        monkeypatch.setattr("flanneld.report.state_file.write_atomic", _refuse)
        assert StateDir(path, NETWORK, etc).identity() == identity
        assert (path / "identity").read_text() == text
        assert len(caplog.records) == 1

    def test_to_look_at_an_identity_changes_nothing(self, path: Path, etc: Path) -> None:
        assert known_identity(path) == ""
        assert not path.exists()
        identity = StateDir(path, NETWORK, etc).identity()
        assert known_identity(path) == identity
        (path / "identity").write_bytes(b"damaged")
        assert known_identity(path) == ""
        assert (path / "identity").read_bytes() == b"damaged"


def _refuse(path: Path, content: bytes, what: str) -> None:
    raise KernelError(f"write {what} {path}", errno.EROFS)


def test_directory_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, etc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    state = StateDir(tmp_path / "file" / "state", NETWORK, etc)
    state.lock()
    identity = state.identity()
    state.remember(*SUBNETS)
    assert state.previous_subnets() == (None, None)
    state.close()
    assert len(caplog.records) == 1
    assert "make it writable or choose another --state-dir" in caplog.text
    assert identity == derive_identity(MACHINE, str(state.path))


HOLDER = """
import sys, time
from pathlib import Path
from flanneld.report.state_dir import StateDir
state = StateDir(Path(sys.argv[1]), sys.argv[2])
state.lock()
print("locked", flush=True)
time.sleep(60)
"""


class TestLock:
    def test_second_daemon_of_a_network_is_refused_and_told_of_the_first(self, path: Path, etc: Path) -> None:
        first = StateDir(path, NETWORK, etc)
        first.lock()
        second = StateDir(path, NETWORK, etc)
        with pytest.raises(ConfigError) as caught:
            second.lock()
        assert f"another flanneld (pid {os.getpid()}) serves the network {NETWORK} on this host" in str(caught.value)
        other = StateDir(path, "/other", etc)
        other.lock()
        other.close()
        first.close()
        second.lock()
        second.close()

    def test_killed_daemon_lets_go(self, path: Path) -> None:
        argv = [sys.executable, "-c", HOLDER, str(path), NETWORK]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout
                assert child.stdout.readline() == "locked\n"
                state = StateDir(path, NETWORK)
                with pytest.raises(ConfigError, match=f"pid {child.pid}"):
                    state.lock()
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()
        state.lock()
        state.close()
