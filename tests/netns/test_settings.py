"""Settings below /proc/sys on a real kernel: writes are heard, whatever becomes of the device; a daemon undoes them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from flanneld.kernel.setting_files import SettingFiles
from flanneld.lab import Lab
from flanneld.lab.node import Host
from tests.netns.test_audit import audit, status
from tests.support.live import until
from tests.support.netns import Netns
from tests.support.wait import until as until_async

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vxlan")]

MakeLab = Callable[..., Lab]
SETTING = "net/ipv4/neigh/fa0.1/app_solicit"
OWN = "net/ipv4/neigh/flannel.1/app_solicit"


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fa-set") as ns:
        make(ns)
        yield ns


def make(ns: Netns) -> None:
    ns.run("ip", "link", "add", "fa0.1", "type", "veth", "peer", "name", "fa1")


def put(ns: Netns, value: int, *, as_container: bool = False) -> None:
    write = ["sh", "-c", f"echo {value} > /proc/sys/{SETTING}"]
    own_proc = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    ns.run(*(own_proc if as_container else []), *write)


class TestFiles:
    def test_each_write_is_heard_once_armed_and_read(self, ns: Netns) -> None:
        async def follow() -> None:
            with closing(SettingFiles()) as files:
                for value in (5, 6):
                    heard = asyncio.Event()
                    files.listen(heard.set)
                    files.read(SETTING)
                    await asyncio.to_thread(put, ns, value)
                    await until_async(heard.is_set)
                    assert files.read(SETTING) == str(value)

        ns.exec_async(follow)

    @pytest.mark.parametrize("away", ["ip link del fa0.1", "ip link set fa0.1 name other"], ids=["deleted", "renamed"])
    def test_a_device_made_anew_is_heard_of_from_the_next_read_on(self, ns: Netns, away: str) -> None:
        async def follow() -> None:
            with closing(SettingFiles()) as files:
                heard = asyncio.Event()
                files.listen(heard.set)
                assert files.read(SETTING) == "0"
                ns.run(*away.split())
                assert files.read(SETTING) is None
                ns.run("ip", "link", "del", "fa1", check=False)  # a pair goes together
                make(ns)
                assert files.read(SETTING) == "0"
                await asyncio.to_thread(put, ns, 4)
                await until_async(heard.is_set)
                assert files.read(SETTING) == "4"

        ns.exec_async(follow)

    def test_a_device_made_anew_again_and_again_leaks_nothing_and_is_not_kept_alive(self, ns: Netns) -> None:
        async def follow() -> None:
            with closing(SettingFiles()) as files:
                files.listen(lambda: None)
                files.read(SETTING)
                before = len(os.listdir("/proc/self/fd"))
                for _ in range(50):
                    ns.run("ip", "link", "del", "fa0.1")
                    make(ns)
                    assert files.read(SETTING) == "0"
                assert len(os.listdir("/proc/self/fd")) == before

        ns.exec_async(follow)

    def test_a_write_through_another_mount_of_proc_is_read_though_not_heard(self, ns: Netns) -> None:
        async def follow() -> None:
            with closing(SettingFiles()) as files:
                files.listen(lambda: None)
                assert files.read(SETTING) == "0"
                await asyncio.to_thread(put, ns, 9, as_container=True)
                assert files.read(SETTING) == "9"

        ns.exec_async(follow)

    def test_files_that_are_not_wanted_any_more_are_let_go(self, ns: Netns) -> None:
        async def follow() -> None:
            with closing(SettingFiles()) as files:
                before = len(os.listdir("/proc/self/fd"))
                files.read(SETTING)
                files.keep(())
                assert len(os.listdir("/proc/self/fd")) == before

        ns.exec_async(follow)


def value(host: Host, path: str = OWN) -> str:
    return host.run("cat", f"/proc/sys/{path}").stdout.strip()


@pytest.mark.etcd
@pytest.mark.needs("iptables")
class TestDaemon:
    def test_changed_settings_are_put_right_by_event_and_told_with_old_and_new(self, make_lab: MakeLab) -> None:
        with make_lab(hosts=1) as lab:
            host = lab.host(1)
            until(lambda: status(host)["state"] == "ready", "it is ready")
            times = 12  # of which a look once a second would find one or two
            script = f"for i in $(seq {times}); do echo 0 > /proc/sys/{OWN}; sleep 0.1; done"
            host.run("sh", "-c", script)
            until(lambda: value(host) == "3", "it is right again")
            told = audit(host)
            assert len(told) >= times - 2, "at most two were written while the watch was being set up"
            assert {(one["kind"], one["what"], one["was"]) for one in told} == {
                ("sysctl", f"sysctl {OWN} = 3", f"sysctl {OWN} = 0")
            }

    def test_a_program_that_sets_it_back_without_end_is_held_back_and_named_and_costs_little(
        self, make_lab: MakeLab
    ) -> None:
        with make_lab(hosts=1) as lab:
            host = lab.host(1)
            vandal = subprocess.Popen(host.command("sh", "-c", f"while :; do echo 0 > /proc/sys/{OWN}; done"))
            try:
                until(lambda: status(host)["state"] == "degraded", "the fight is noticed")
                [remark] = status(host)["remarks"]
                assert OWN in remark
                assert "stop that program" in remark
                used, looked = cpu_s(host), audit(host)[-1]["seen"]
                until(lambda: audit(host)[-1]["seen"] > looked + 1.5, "the next repair while it goes on")
                elapsed = audit(host)[-1]["seen"] - looked
                assert cpu_s(host) - used < 0.25 * elapsed
            finally:
                vandal.kill()
                vandal.wait()
            until(lambda: value(host) == "3", "it is put right when its time has come")
            assert len(audit(host)) < 60


def cpu_s(host: Host) -> float:
    """Processor time that a host's daemon has taken."""
    with open(f"/proc/{host.daemon.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.etcd
@pytest.mark.needs("iptables")
class TestHost:
    def test_forwarding_that_is_switched_off_is_told_with_the_remedy_and_left_to_the_operator(
        self, make_lab: MakeLab
    ) -> None:
        with make_lab(hosts=1) as lab:
            host = lab.host(1)
            until(lambda: status(host)["state"] == "ready", "it is ready")
            for path in ("net/ipv4/ip_forward", "net/ipv4/conf/flannel.1/forwarding"):
                host.run("sh", "-c", f"echo 0 > /proc/sys/{path}")
                until(lambda: status(host)["state"] == "degraded", "it is noticed")
                [remark] = status(host)["remarks"]
                assert remark.startswith("IPv4 forwarding is off")
                assert remark.endswith(f"write 1 to /proc/sys/{path}")
                assert host.daemon.is_ready(), "other hosts' containers are no better off without it"
                assert value(host, path) == "0", "it is the host's"
                host.run("sh", "-c", f"echo 1 > /proc/sys/{path}")
                until(lambda: status(host)["state"] == "ready", "it is over")
                assert f"no longer: {remark}" in host.daemon.log()

    def test_strict_source_validation_is_worth_a_line_and_no_alarm(self, make_lab: MakeLab) -> None:
        with make_lab(hosts=1) as lab:
            host = lab.host(1)
            host.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter")
            until(lambda: "rp_filter is strict on eth0" in host.daemon.log(), "it is told")
            assert status(host)["state"] == "ready"
