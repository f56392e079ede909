"""A whole daemon while its etcd fails in every way that etcd fails in (failures F16, F26, F28, F29).

After each fault: the right routes, the same lease, the same process; and during it a bounded log and little CPU.
How long news took is in ``flanneld/design/figures/etcd-faults.md``; ``pytest -s`` prints it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.etcd import Certificates, Member
from tests.support.etcd_bed import KEYS, OURS, EtcdBed

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("nft"), pytest.mark.timeout(120)]

LINES_AT_MOST = 12
CPU_S_AT_MOST = 1.0
HANGING_S = 11.0
"""Until news from a member that fell silent comes through another: pings take 6 s and 3 s, then there is a pause."""
RECOVERED_S = 4.0
"""From the moment etcd works again until news arrives."""
USERS = {"root": "root-secret", "flannel": "flannel-secret"}


@contextlib.contextmanager
def fault(
    bed: EtcdBed, name: str, *, lines: int = LINES_AT_MOST, same_lease: bool = True, cpu_s: float = CPU_S_AT_MOST
) -> Iterator[None]:
    """Around a fault and its end: what holds of each of them."""
    before = bed.own_key()
    began = time.monotonic()
    with bed.measured() as cost:
        yield
        bed.until(bed.is_ready, "the daemon is ready, and nothing is to remark")
    told = "\n".join(cost[0].lines)
    assert bed.is_running(), told
    assert len(cost[0].lines) <= lines, told
    assert cost[0].cpu_s <= cpu_s, f"{cost[0].cpu_s} s of CPU in {time.monotonic() - began:.0f} s"
    assert "Traceback" not in told
    assert "secret" not in told
    after = bed.own_key()
    assert after["key"] == before["key"]
    if same_lease:
        assert after["create_revision"] == before["create_revision"], "our key was gone meanwhile"
    print(f"\n{name}: {len(cost[0].lines)} lines, {cost[0].cpu_s:.2f} s of CPU in {time.monotonic() - began:.0f} s")


def news(bed: EtcdBed, number: int, within_s: float) -> None:
    """A host that joins now is known soon."""
    taken_s = bed.add_peer(number)
    seen_s = bed.until_route(number, within_s)
    print(f"\nnews: etcd took it after {taken_s:.2f} s, the route was there {seen_s:.2f} s later")


def test_a_member_that_is_killed_is_hardly_noticed() -> None:
    with EtcdBed() as bed:
        for number in range(20, 23):
            with fault(bed, "watched member killed", lines=4):
                member = bed.watched()
                member.kill()
                news(bed, number, 2.0)
                member.start()
                member.wait_healthy()
        assert bed.routes() == {20, 21, 22}


@pytest.mark.parametrize("how", ["kill", "move"])
def test_leader_changes_are_hardly_noticed(how: str) -> None:
    with EtcdBed() as bed:
        for number in range(20, 23):
            with fault(bed, f"leader changes, {how}", lines=6):
                leader = bed.leader()
                if how == "kill":
                    leader.kill()
                    news(bed, number, 2.0)
                    leader.start()
                    leader.wait_healthy()
                else:
                    move_leader(bed, leader)
                    news(bed, number, 2.0)
        assert bed.routes() == {20, 21, 22}


def move_leader(bed: EtcdBed, leader: Member) -> None:
    """Hand leadership to another member, as ``etcdctl move-leader`` does before maintenance."""
    listed = [line.split(", ") for line in bed.etcd.ctl("member", "list").splitlines()]
    [target, *_] = [fields[0] for fields in listed if leader.address not in fields[3]]
    bed.etcd.ctl("move-leader", target, f"--endpoints={bed.etcd.scheme}://{leader.address}:2379")
    bed.until(lambda: bed.leader() is not leader, "another leader")


@pytest.mark.parametrize("how", ["stopped", "cut off"])
def test_a_member_that_falls_silent_is_left_in_seconds(how: str) -> None:
    with EtcdBed() as bed, fault(bed, f"watched member {how}"):
        member = bed.watched()
        member.stop() if how == "stopped" else bed.cut_off(member)
        news(bed, 20, HANGING_S)
        member.cont() if how == "stopped" else bed.heal(member)
        bed.remove_peer(20)
        bed.until(lambda: bed.routes() == set(), "it is gone again")


@pytest.mark.parametrize("members", [2, 3])
def test_partition_without_quorum_keeps_the_data_path_and_ends_soon_after_it_is_healed(members: int) -> None:
    """The one that can be reached says that it has no leader; a watch there would be silent for ever."""
    with EtcdBed() as bed, fault(bed, f"{members} of 3 members cut off for 20 s"):
        bed.add_peer(20)
        bed.until_route(20)
        silent = bed.etcd.members[:members]
        for member in silent:
            bed.cut_off(member)
        bed.until(lambda: "etcd cannot be watched" in bed.readyz()[1], "the outage is shown", 25.0)
        time.sleep(5.0)  # an outage has a length
        assert bed.readyz()[0] == 200, "what is known goes on working"
        assert bed.routes() == {20}
        for member in silent:
            bed.heal(member)
        # A member that was cut off may know the leader again and not hear from it yet: etcd takes up to 10 s to
        # repair its own connections, and a watch there is silent until then. Reading would tell, at 5000 hosts' cost.
        news(bed, 21, RECOVERED_S if members == 3 else 15.0)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_outage_of_all_members_ends_soon_after_they_are_back(how: str) -> None:
    with EtcdBed() as bed, fault(bed, f"all members {how} for 10 s"):
        for member in bed.etcd.members:
            member.kill() if how == "killed" else member.stop()
        time.sleep(10.0)  # an outage has a length
        assert bed.readyz()[0] == 200
        for member in bed.etcd.members:
            member.start() if how == "killed" else member.cont()
        news(bed, 20, RECOVERED_S)


def test_compaction_during_a_disconnect_loses_and_invents_nothing() -> None:
    """Go flanneld 0.27 misses the removals (failures F26)."""
    with EtcdBed() as bed, fault(bed, "host cut off, history compacted meanwhile"):
        for number in range(20, 30):
            bed.add_peer(number)
        bed.until(lambda: bed.routes() == set(range(20, 30)), "ten peers")
        bed.switch.run("ip", "link", "set", "p0", "down")
        for number in range(20, 25):
            bed.remove_peer(number)
        bed.add_peer(40)
        compact(bed)
        for member in bed.etcd.members:  # without this the connection would just go on where it was
            member.kill()
            member.start()
        for member in bed.etcd.members:
            member.wait_healthy()
        bed.switch.run("ip", "link", "set", "p0", "up")
        seconds = bed.until(lambda: bed.routes() == {*range(25, 30), 40}, "what etcd says")
        print(f"\nright {seconds:.2f} s after the link was back")


def compact(bed: EtcdBed) -> None:
    header = bed.etcd.ctl("get", "x", "-w", "json", user=bed.root)
    revision = header.partition('"revision":')[2].partition(",")[0]
    bed.etcd.ctl("compact", "--physical", revision, user=bed.root)


@pytest.mark.parametrize("knows_us", [True, False], ids=["of today", "of before we came"])
def test_store_restored_from_an_older_backup_gets_our_lease_back_and_costs_no_peer(knows_us: bool) -> None:
    """Revisions begin below those that a watch waits for (failures F16)."""
    with EtcdBed(1) as bed:
        backup = bed.directory / "backup.db"
        if not knows_us:
            bed.etcd.ctl("del", f"{KEYS}subnets/{OURS}")
            bed.etcd.save(backup)
            bed.until(lambda: bed.own_key(), "our key again")
        else:
            bed.etcd.save(backup)
        for number in range(20, 40):
            bed.add_peer(number)
        bed.until_route(39)
        with fault(bed, "restored from a backup", same_lease=False):
            bed.etcd.restore(backup)
            bed.until(lambda: bed.own_key(), "our key in the restored store")
            assert bed.routes() == set(range(20, 40)), "peers that the backup does not know have not moved"
            news(bed, 50, RECOVERED_S)
        assert bed.routes() == {*range(20, 40), 50}
        assert "etcd was replaced by another or older store" in bed.log()


def test_etcd_that_runs_a_fifth_of_the_time_is_waited_for() -> None:
    """Stands for a slow disk: members that are stopped for 400 ms of every 500. Real ones stall in fsync only."""
    with EtcdBed() as bed, fault(bed, "members stopped four fifths of the time, 20 s", lines=30):
        over = threading.Event()
        limping = threading.Thread(target=limp, args=(bed, over))
        limping.start()
        try:
            arrived = []
            deadline = time.monotonic() + 20.0
            number = 20
            while time.monotonic() < deadline:
                bed.add_peer(number)
                arrived.append(bed.until_route(number, 15.0))
                number += 1
        finally:
            over.set()
            limping.join()
        print(f"\n{len(arrived)} leases, each known after {max(arrived):.2f} s at most")
        assert bed.routes() == set(range(20, number))


def limp(bed: EtcdBed, over: threading.Event) -> None:
    while not over.is_set():
        for member in bed.etcd.members:
            member.stop()
        over.wait(0.4)
        for member in bed.etcd.members:
            member.cont()
        time.sleep(0.1)


def test_full_database_is_named_with_its_remedy_and_the_lease_comes_back_afterwards() -> None:
    """The alarm NOSPACE: deleting works, writing does not."""
    with EtcdBed(extra=["--quota-backend-bytes=2000000"]) as bed, fault(bed, "database full", same_lease=False):
        raise_alarm(bed)
        bed.etcd.ctl("del", f"{KEYS}subnets/{OURS}")
        bed.until(lambda: "database space exceeded" in bed.log(), "the reason is told")
        assert "etcdctl alarm disarm" in bed.log()
        assert bed.readyz()[0] == 200
        free_space(bed)
        seconds = bed.until(lambda: bed.own_key(), "our key again", 10.0)
        print(f"\nour key was back {seconds:.2f} s after the alarm was over")
        news(bed, 20, RECOVERED_S)


def raise_alarm(bed: EtcdBed) -> None:
    for number in range(100):
        try:
            bed.etcd.ctl("put", f"/fill/{number}", "x" * 100_000)
        except AssertionError:
            break
    assert "NOSPACE" in bed.etcd.ctl("alarm", "list")


def free_space(bed: EtcdBed) -> None:
    bed.etcd.ctl("del", "--prefix", "/fill/")
    compact(bed)
    for member in bed.etcd.members:
        bed.etcd.ctl("defrag", f"--endpoints={bed.etcd.scheme}://{member.address}:2379")
    bed.etcd.ctl("alarm", "disarm")


# ---- who may talk to etcd ------------------------------------------------------------------------


def test_tokens_that_expire_all_the_time_are_renewed_unnoticed() -> None:
    with EtcdBed(tls=True, users=USERS, extra=["--auth-token-ttl=1"]) as bed:
        with fault(bed, "tokens expire after 1 s, 15 s", lines=12):
            for number in range(20, 25):
                time.sleep(3.0)  # a token dies of not being used
                news(bed, number, 2.0)
        assert "cannot" not in bed.log().partition(" ready subnet=")[2]


def test_user_that_is_deleted_and_made_again_is_waited_for() -> None:
    with EtcdBed(tls=True, users=USERS) as bed, fault(bed, "user deleted for 10 s", lines=14):
        bed.etcd.ctl("user", "delete", "flannel", user=bed.root)
        reconnect(bed)
        bed.until(lambda: "etcd cannot be watched" in bed.readyz()[1], "it is told")
        time.sleep(10.0)
        assert bed.readyz()[0] == 200
        bed.etcd.ctl("user", "add", f"flannel:{USERS['flannel']}", user=bed.root)
        bed.etcd.ctl("user", "grant-role", "flannel", "role-flannel", user=bed.root)
        news(bed, 20, 8.0)


def test_role_that_is_revoked_and_granted_again_is_waited_for() -> None:
    with EtcdBed(tls=True, users=USERS) as bed, fault(bed, "role revoked for 10 s", lines=14):
        bed.etcd.ctl("user", "revoke-role", "flannel", "role-flannel", user=bed.root)
        reconnect(bed)
        bed.until(lambda: "etcd cannot be watched" in bed.readyz()[1], "it is told")
        time.sleep(10.0)
        assert bed.readyz()[0] == 200
        bed.etcd.ctl("user", "grant-role", "flannel", "role-flannel", user=bed.root)
        news(bed, 20, 8.0)


def reconnect(bed: EtcdBed) -> None:
    """etcd goes on with watches that were allowed once; a new connection shows what is allowed now."""
    for member in bed.etcd.members:
        member.kill()
        member.start()
    for member in bed.etcd.members:
        member.wait_healthy()


def test_ca_and_certificates_are_changed_under_load_member_by_member() -> None:
    """Failures F28. As one does it: trust both CAs, change the servers, change the clients, trust the new one only."""
    with EtcdBed(tls=True) as bed, fault(bed, "CA, server and client certificates changed", lines=12):
        assert bed.etcd.certificates
        files, new = bed.etcd.certificates, Certificates(bed.directory / "new")
        new.issue(*(member.address for member in bed.etcd.members))
        both = Path(files.ca).read_text() + Path(new.ca).read_text()
        over = threading.Event()
        numbers: list[int] = []
        load = threading.Thread(target=write_on, args=(bed, over, numbers))
        load.start()
        try:
            steps = [
                [(files.ca, both)],
                [(files.server_cert, text(new.server_cert)), (files.server_key, text(new.server_key))],
                [(files.cert, text(new.cert)), (files.key, text(new.key))],
                [(files.ca, text(new.ca))],
            ]
            for step in steps:
                for path, content in step:
                    Path(path).write_text(content)
                for member in bed.etcd.members:
                    member.kill()
                    member.start()
                    member.wait_healthy()
        finally:
            over.set()
            load.join()
        news(bed, 200, RECOVERED_S)
        bed.until(lambda: bed.routes() == {*numbers, 200}, "all that was written meanwhile")


def text(path: str) -> str:
    return Path(path).read_text()


def write_on(bed: EtcdBed, over: threading.Event, numbers: list[int]) -> None:
    number = 20
    while not over.is_set() and number < 199:
        bed.add_peer(number)
        numbers.append(number)
        number += 1
        time.sleep(0.2)


def test_client_certificate_that_expires_is_named_and_its_successor_used_without_a_signal() -> None:
    with EtcdBed(tls=True) as bed:
        assert bed.etcd.certificates
        files = bed.etcd.certificates
        good = text(files.cert), text(files.key)
        with fault(bed, "client certificate expired for 10 s", lines=14):
            write_expired(files)
            reconnect(bed)
            bed.until(lambda: "etcd cannot be watched" in bed.readyz()[1], "it is told")
            time.sleep(10.0)
            assert files.cert in bed.log().rpartition("etcd cannot be watched")[2]
            Path(files.cert).write_text(good[0])
            Path(files.key).write_text(good[1])
            news(bed, 20, 8.0)


def write_expired(files: Certificates) -> None:
    """A client certificate that ended yesterday, of a CA that etcd does trust."""
    authority = trustme.CA()
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    cert = authority.issue_cert("client.example", not_after=yesterday)
    trusted = Path(files.ca).read_text()
    Path(files.ca).write_text(trusted + authority.cert_pem.bytes().decode())
    cert.cert_chain_pems[0].write_to_path(files.cert)
    cert.private_key_pem.write_to_path(files.key)
    os.utime(files.cert)


@pytest.mark.needs("faketime")
def test_clock_that_jumps_years_ahead_and_back_moves_no_lease() -> None:
    """Failures F23: lives of leases are counted by a clock that nobody sets. Certificates are another matter."""
    with EtcdBed(tls=True, has_own_clock=True) as bed:
        with fault(bed, "clock jumps by days and years", lines=6):
            mod_revision = bed.own_key()["mod_revision"]
            for number, offset in enumerate(("+3d", "-3d", "+20y", "-40y", "+0"), 20):
                bed.set_clock(offset)
                news(bed, number, 2.0)
            time.sleep(1.0)  # a renewal would have come
            assert bed.own_key()["mod_revision"] == mod_revision, "nothing was renewed early"
        with fault(bed, "clock before the certificates' beginning for 5 s", lines=10):
            bed.set_clock("-40y")
            reconnect(bed)
            bed.until(lambda: "check this machine's clock" in bed.readyz()[1], "it is told")
            time.sleep(5.0)
            bed.set_clock("+0")
            news(bed, 30, RECOVERED_S)
        bed.set_clock("-40y")
        assert bed.process
        bed.process.kill()
        bed.process.wait()
        bed.start()
        bed.until(lambda: "not yet valid" in bed.log(), "a start in the wrong year says so")
        bed.until(lambda: bed.readyz()[0] == 200, "it works from memory all the same")
        bed.set_clock("+0")
        news(bed, 31, 8.0)
        bed.until(bed.is_ready, "all is well")
        assert bed.own_key()


def test_idle_watch_is_kept_by_pings_that_etcd_does_not_mind() -> None:
    with EtcdBed(1) as bed:
        before = connections(bed)
        time.sleep(27.0)  # four pings; etcd closes after the third that comes too soon
        assert connections(bed) == before


def connections(bed: EtcdBed) -> str:
    return bed.host.run("ss", "-Htn", "state", "established", "dport", "=", ":2379").split()[2]
