"""A booted Debian with an underlay, an etcd and a neighbour, on which flanneld is installed as its operator would.

The neighbour is a namespace in there: it stands for a host whose flanneld wrote its lease and went away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from flanneld.lab.etcd import binary
from tests.support.nspawn import Machine
from tests.support.wait import until

PACKAGES = [
    *("systemd", "systemd-sysv", "udev", "python3-venv", "iproute2", "nftables", "iptables", "iputils-ping", "procps"),
    *("network-manager", "dhcpcd5", "docker.io"),
]
IDLE = (
    *("NetworkManager.service", "NetworkManager-wait-online.service", "dhcpcd.service"),
    *("docker.service", "docker.socket", "containerd.service"),
)
"""Their tests start them; until then the underlay is the test's."""
REPOSITORY = Path(__file__).parents[2]
ADDRESS, NEIGHBOUR = "192.0.2.11", "192.0.2.12"
SUBNET, GATEWAY, NEIGHBOUR_SUBNET, NEIGHBOUR_POD = "10.5.1.0/24", "10.5.1.1", "10.5.9.0/24", "10.5.9.1"
NEIGHBOUR_MAC = "02:00:00:00:00:09"
NETWORK = {"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.1.0"}
DROP_IN = "/run/systemd/system/flanneld.service.d/test.conf"

UNDERLAY = f"""\
[Unit]
DefaultDependencies=no
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip netns add neighbour
ExecStart=ip link add eth0 type veth peer name eth0 netns neighbour
ExecStart=ip -n neighbour link set eth0 up
ExecStart=ip -n neighbour addr add {NEIGHBOUR}/24 dev eth0
ExecStart=ip link set eth0 up
ExecStart=ip addr add {ADDRESS}/24 dev eth0
ExecStart=ip addr add 2001:db8::11/64 dev eth0 nodad
ExecStart=ip route add default via {NEIGHBOUR}
ExecStart=ip -6 route add default via 2001:db8::12
[Install]
WantedBy=multi-user.target
"""
ETCD = """\
[Unit]
After=underlay.service
[Service]
Type=notify
ExecStart=/usr/local/bin/etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --log-level=warn
[Install]
WantedBy=multi-user.target
"""
# What a test leaves behind goes; what is installed stays.
RESET = f"""
systemctl stop flanneld 2>/dev/null || true
rm -rf {DROP_IN} /run/flannel/* /var/lib/flanneld/*
systemctl daemon-reload
systemctl reset-failed
systemctl start etcd
etcdctl del --prefix '' >/dev/null
for device in $(ls /sys/class/net | grep -E '^(flannel|cni|veth|docker)'); do
    ip link delete $device 2>/dev/null || true
done
ip -n neighbour link delete flannel.1 2>/dev/null || true
ip netns delete container 2>/dev/null || true
ip -n neighbour addr flush dev lo
ip -n neighbour route flush root {SUBNET}
ip route flush proto 86
ip route flush type unreachable proto 86
nft flush ruleset
iptables-legacy -F; iptables-legacy -t nat -F
for tool in iptables ip6tables; do
    update-alternatives --set $tool /usr/sbin/$tool-nft >/dev/null
done
"""


class SystemdHost:
    """The machine, and what a test does to it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.run, self.sh = machine.run, machine.sh

    def prepare(self) -> None:
        """Before the first boot: the units around flanneld, started at every boot."""
        units = self.machine.root / "etc/systemd/system"
        wants = units / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        for name, text in (("underlay", UNDERLAY), ("etcd", ETCD)):
            (units / f"{name}.service").write_text(text)
            (wants / f"{name}.service").symlink_to(f"../{name}.service")
        for name in IDLE:
            (units / name).symlink_to("/dev/null")

    def install(self, *options: str) -> str:
        """Run the installer, with the wheels that ``wheels`` made and no other; returns what it says."""
        pip = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels"
        return self.sh(f"{pip} /src/deploy/systemd/install.sh {' '.join(options)}")

    def reset(self) -> None:
        """Stop flanneld and remove all that it, and the test before, left."""
        self.sh(RESET)

    def configure(self, backend: str, keys: Mapping[str, object] = {}, drop_in: str = "") -> None:
        """Write the network configuration, the neighbour's lease, and additions to the unit for this test only."""
        self.put("config", {**NETWORK, **keys, "Backend": {"Type": backend}})
        lease: dict[str, object] = {"PublicIP": NEIGHBOUR}
        if backend != "udp":
            lease["BackendType"] = backend
        if backend == "vxlan":
            lease["BackendData"] = {"VNI": 1, "VtepMAC": NEIGHBOUR_MAC}
        self.put(f"subnets/{NEIGHBOUR_SUBNET.replace('/', '-')}", lease)
        if drop_in:
            self.drop_in(drop_in)

    def put(self, key: str, value: Mapping[str, object]) -> None:
        """Write a key of the network into etcd."""
        self.run("etcdctl", "put", f"/coreos.com/network/{key}", json.dumps(value))

    def drop_in(self, text: str) -> None:
        """Add settings to the unit, until the reset."""
        self.sh(f"mkdir -p {Path(DROP_IN).parent}")
        self.run("tee", DROP_IN, stdin=f"[Service]\n{text}\n")
        self.run("systemctl", "daemon-reload")

    def start(self) -> None:
        """Start it and come back when systemd says that it is started, which is when it is ready."""
        said = self.run("systemctl", "start", "flanneld", check=False)
        assert self.show("ActiveState") == "active", said + self.journal()

    async def ready(self, not_pid: int = 0) -> None:
        """Wait until it is ready, in another process than ``not_pid``."""
        try:
            await until(lambda: self.show("StatusText").startswith("ready") and self.pid not in (0, not_pid))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal()}") from None

    def show(self, name: str, unit: str = "flanneld") -> str:
        """A property of a unit, as ``systemctl show`` has it."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    @property
    def pid(self) -> int:
        """Of the daemon, in the machine's own numbering; 0 when it does not run."""
        return int(self.show("MainPID"))

    def journal(self) -> str:
        """What flanneld and systemd said of it, at the end."""
        return self.run("journalctl", "-u", "flanneld", "--no-pager", "-o", "cat", "-n", "40", check=False)

    def capabilities(self) -> list[str]:
        """What the running daemon can ever have."""
        status = dict(line.split(":\t", 1) for line in self.status_file().splitlines())
        mask = int(status["CapBnd"], 16)
        known = {12: "net_admin", 13: "net_raw", 39: "bpf"}
        return [known.get(bit, str(bit)) for bit in range(64) if mask >> bit & 1]

    def status_file(self) -> str:
        """/proc/PID/status of the daemon."""
        return self.run("cat", f"/proc/{self.pid}/status")

    def connect_neighbour(self, backend: str, bridge: bool = True) -> None:
        """Give the neighbour a container's address and a way back, by hand; and us a bridge with its address."""
        if bridge:
            self.sh(f"ip link add cni0 type bridge; ip addr add {GATEWAY}/24 dev cni0; ip link set cni0 up")
        if backend == "host-gw":
            self.sh(
                f"ip -n neighbour link set lo up; ip -n neighbour addr add {NEIGHBOUR_POD}/32 dev lo\n"
                f"ip -n neighbour route add {SUBNET} via {ADDRESS}"
            )
            return
        mac = self.run("cat", "/sys/class/net/flannel.1/address").strip()
        base = SUBNET.partition("/")[0]
        self.sh(
            f"""ip -n neighbour link add flannel.1 address {NEIGHBOUR_MAC} type vxlan id 1 local {NEIGHBOUR} \
                dev eth0 dstport 8472 nolearning
            ip -n neighbour addr add {NEIGHBOUR_POD}/32 dev flannel.1
            ip -n neighbour link set flannel.1 up
            ip -n neighbour neigh add {base} lladdr {mac} dev flannel.1
            ip netns exec neighbour bridge fdb add {mac} dev flannel.1 dst {ADDRESS}
            ip -n neighbour route add {SUBNET} via {base} dev flannel.1 onlink"""
        )

    def ping(self, count: int = 3) -> subprocess.Popen[str]:
        """Ping from our container's address to the neighbour's, fifty times a second."""
        return self.machine.popen("ping", "-n", "-i", "0.02", "-c", str(count), "-I", GATEWAY, NEIGHBOUR_POD)


def lost(ping: subprocess.Popen[str]) -> str:
    """Wait for a ping to end; what it says it lost, ``0%`` at best."""
    said, _ = ping.communicate(timeout=60)
    found = [word for line in said.splitlines() if "packet loss" in line for word in line.split() if word.endswith("%")]
    assert found, said
    return found[0]


def wheels(folder: Path, python: str) -> Path:
    """Our wheel and those it depends on, in a directory.

    Args:
        folder: where to.
        python: version of the interpreter that will take them, ``3.11``.
    """
    tree, made = folder / "tree", folder / "wheels"
    tree.mkdir(parents=True)
    for name in ("flanneld", "backends"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={made}", str(tree)], check=True, timeout=120
    )
    (ours,) = made.glob("flanneld-*.whl")
    wanted = [str(ours), "setuptools>=68", "wheel"]  # the latter two because the installer can build from the tree
    subprocess.run(
        [*pip, "download", f"--dest={made}", "--only-binary=:all:", f"--python-version={python}", *wanted],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    return made


def binds(wheel_folder: Path) -> dict[Path, str]:
    """What the machine sees of this one, and where."""
    return {
        REPOSITORY: "/src",
        wheel_folder: "/wheels",
        Path(binary("etcd")): "/usr/local/bin/etcd",
        Path(binary("etcdctl")): "/usr/local/bin/etcdctl",
    }
