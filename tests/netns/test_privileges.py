"""What a daemon may do: at work it holds a handful of capabilities, on every backend, and repairs as before."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flanneld.kernel.privileges import ALWAYS, Cap
from flanneld.lab import Lab
from flanneld.lab.probe import ping
from flanneld.lab.spec import SUBNETS_KEY
from tests.netns.test_cold_start import power_cut, remembers_all
from tests.netns.test_fencing_lab import THIEF, key_of, status
from tests.netns.test_store_returns import configure, start_from_memory
from tests.support.live import assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]
SETS = ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")


def held(pid: int) -> dict[str, set[int]]:
    """Sets of capabilities of a process, all its threads together; of the bounding set, which counts for programs
    that it runs, those of the thread that runs them."""
    found: dict[str, set[int]] = {name: set() for name in SETS}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for name, text in re.findall(r"^(Cap\w+):\s+(\S+)$", (thread / "status").read_text(), re.MULTILINE):
            if name != "CapBnd" or thread.name == str(pid):
                found[name] |= {number for number in range(64) if int(text, 16) >> number & 1}
    return found


def is_at_work(pid: int) -> bool:
    """Whether the second step is done, which comes with the first readiness."""
    return Cap.SETPCAP not in held(pid)["CapPrm"]


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", pytest.param("udp", marks=pytest.mark.needs("udp_kernel"))])
@pytest.mark.parametrize("nftables", [False, pytest.param(True, marks=pytest.mark.needs("nft"))])
def test_a_daemon_at_work_holds_few_capabilities_and_repairs_all_the_same(
    make_lab: MakeLab, backend: str, nftables: bool
) -> None:
    lab = make_lab(2, backend={"Type": backend}, config={"EnableNFTables": nftables})
    lab.up()
    first = lab.host(1)
    pid = first.daemon.pid
    assert pid is not None
    until(lambda: is_at_work(pid), "what only the start needs is given up")
    sets = held(pid)
    wanted = set(ALWAYS) | ({Cap.BPF} if backend == "udp" else set())
    assert sets["CapPrm"] == sets["CapEff"] == sets["CapBnd"] == wanted
    assert sets["CapInh"] == sets["CapAmb"] == set()
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^Max core file size +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
    if backend == "udp":
        assert "kernel" in first.daemon.log()
    # firewall tools, netlink and settings work without the rest
    before = rules(lab, nftables)
    first.run("sh", "-c", "nft flush ruleset; iptables -w -t nat -F; iptables -w -F", check=False)
    first.run("sh", "-c", "ip route flush proto 86; ip link set flannel.1 down; ip link set flannel0 down", check=False)
    until(lambda: rules(lab, nftables) == before, "the rules are back")
    until(lambda: ping(first.pod, lab.host(2).pod_address()).lost == 0, "the pods are connected again")
    assert_all_pods_connected(lab)
    assert first.daemon.is_ready()


def rules(lab: Lab, nftables: bool) -> str:
    """Our rules, without what counts packets."""
    first = lab.host(1)
    if nftables:
        return first.run("nft", "-s", "list", "ruleset").stdout
    return "".join(sorted(re.findall(r"^-A.*flannel.*\n", first.run("iptables-save").stdout, re.MULTILINE | re.I)))


def test_a_daemon_may_be_told_to_keep_what_it_has(make_lab: MakeLab) -> None:
    lab = make_lab(1, daemon_flags=("--drop-privileges=false",))
    lab.up()
    pid = lab.host(1).daemon.pid
    assert pid is not None
    assert Cap.SYS_ADMIN in held(pid)["CapPrm"]


@pytest.mark.needs("udp_kernel")
def test_a_host_that_started_from_memory_can_still_become_what_the_store_says(make_lab: MakeLab) -> None:
    with make_lab(1) as lab:
        host = lab.host(1)
        until(lambda: remembers_all(lab), "it remembers its lease")
        power_cut(host)
        configure(lab, Backend={"Type": "udp"})
        start_from_memory(lab, host)
        pid = host.daemon.pid
        assert pid is not None
        lab.etcd.start()
        until(lambda: "udp data path" in host.daemon.log() and host.daemon.is_ready(), "the other backend works")
        assert host.daemon.pid == pid
        assert status(host)["data_path"] == "udp data path kernel"
        until(lambda: is_at_work(pid), "what only the start needs is given up")


@pytest.mark.needs("udp_kernel")
def test_a_host_that_moves_to_a_backend_for_which_it_gave_up_too_much_ends_and_says_so(make_lab: MakeLab) -> None:
    """A supervisor starts it again, with everything."""
    with make_lab(1) as lab:
        host = lab.host(1)
        pid, key = host.daemon.pid, key_of(lab, host)
        assert pid is not None
        until(lambda: is_at_work(pid), "what only the start needs is given up")
        configure(lab, Backend={"Type": "udp"})
        until(lambda: "needs a restart" in host.daemon.log(), "the change is refused")
        value = lab.etcd.items(SUBNETS_KEY)[key]
        host.daemon.signal(signal.SIGSTOP)
        lab.etcd.delete(key)
        lab.etcd.put(key, json.dumps({**json.loads(value), **THIEF}))
        host.daemon.signal(signal.SIGCONT)
        until(lambda: not host.daemon.is_running(), "it ends")
        assert "the backend is udp by now and needs CAP_BPF" in host.daemon.log()
        assert "Traceback" not in host.daemon.log()
        host.daemon.start()
        host.daemon.wait_ready()
        assert status(host)["data_path"] == "udp data path kernel"


TRY = """
import os, socket, subprocess, sys
from flanneld.kernel.privileges import keep_at_start, keep_at_work
for turn in range(2):  # a daemon that begins anew does it again
    keep_at_start(sys.argv[2:])
    keep_at_work(sys.argv[1])
def may(action):
    try:
        action()
    except PermissionError:
        return "refused"
    return "done"
print(may(lambda: os.chown("/tmp", 1, 1)), may(lambda: os.setuid(65534)), may(lambda: socket.sethostname("x")))
print(subprocess.run(["ip", "link", "add", "d0", "type", "bridge"], capture_output=True).returncode)
print(subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode)
print(open("/proc/self/status").read())
"""


def try_out(*arguments: str, user: Sequence[str] = ()) -> list[str]:
    """Give up privileges in namespaces of our own, and try what is left; its report."""
    argv = ["unshare", "--net", "--uts", *user, sys.executable, "-c", TRY, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()


def test_what_was_given_up_is_gone_for_the_process_and_for_the_programs_it_runs() -> None:
    outcomes, link, mount, *status = try_out("vxlan")
    assert outcomes == "refused refused refused"
    assert link == "0"
    assert mount != "0"
    left = sum(1 << cap for cap in ALWAYS)
    assert [line for line in status if line.startswith(("CapPrm", "CapEff", "CapBnd"))] == [
        f"{name}:\t{left:016x}" for name in ("CapPrm", "CapEff", "CapBnd")
    ]


def test_a_daemon_of_an_ordinary_user_keeps_what_its_tools_need_and_no_more() -> None:
    """As ``deploy/systemd/README.md`` has it: capabilities come and go on through the ambient set."""
    given = "-all,+net_admin,+net_raw,+sys_time"
    ordinary = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    outcomes, link, _mount, *status = try_out(
        "vxlan", user=[*ordinary, f"--inh-caps={given}", f"--ambient-caps={given}"]
    )
    assert outcomes.split()[0] == outcomes.split()[2] == "refused"
    assert link == "0"
    both = 1 << Cap.NET_ADMIN | 1 << Cap.NET_RAW
    assert f"CapPrm:\t{both:016x}" in status
    assert f"CapAmb:\t{both:016x}" in status


def test_a_directory_of_another_user_can_still_be_written_and_costs_one_capability(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 4711, 4711)
    status = "\n".join(try_out("vxlan", str(theirs / "net.d")))
    found = re.search(r"CapPrm:\s+(\S+)", status)
    assert found is not None
    assert int(found[1], 16) == sum(1 << cap for cap in ALWAYS | {Cap.DAC_OVERRIDE})
