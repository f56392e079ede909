"""The container image run with podman as the daemon of a lab's host (contract 10.1, 10.5, 10.6)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld import __version__
from flanneld.lab import Lab
from tests.support.image import IMAGE, LIMITS, Workshop
from tests.support.tell import Tell

pytestmark = [pytest.mark.needs("debian", "buildah", "podman"), pytest.mark.timeout(600)]


class Container:
    """The image as the daemon of the lab's first host, run as deploy/image/README.md says.

    Instead of the machine's own files it gets those of the lab's host.
    """

    def __init__(self, workshop: Workshop, lab: Lab, *options: str) -> None:
        self._workshop = workshop
        self._host = lab.host(1)
        self.name = f"flanneld-{lab.spec.name}"
        directory = self._host.directory
        volumes = [f"{directory}:/run/flannel", f"{directory}/state:/var/lib/flanneld"]
        volumes += [f"{directory}/xtables.lock:/run/xtables.lock", f"{directory}/machine-id:/etc/machine-id:ro"]
        flags = [flag for flag in self._host.daemon.flags() if not flag.startswith("--subnet-file")]
        began = time.monotonic()
        workshop.podman(
            *("run", "--detach", f"--name={self.name}", "--pull=never", "--no-hosts", *LIMITS),
            f"--network=ns:/run/netns/{self._host.netns}",
            *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--cap-add=NET_ADMIN,NET_RAW"),
            *(f"--volume={volume}" for volume in volumes),
            *(*options, IMAGE, *flags),
        )
        self._wait_ready(began + 30)
        self.ready_s = time.monotonic() - began

    def _wait_ready(self, deadline: float) -> None:
        while not self._host.daemon.is_ready():
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready: {self.ctl('health', '--ready')[1]}\n{self.log()}")
            time.sleep(0.02)

    def ctl(self, *words: str) -> tuple[int, str]:
        return self._workshop.status("exec", self.name, "/opt/bin/flannelctl", *words)

    def log(self) -> str:
        return self._workshop.log(self.name)

    def status(self) -> dict[str, str]:
        """``/proc/PID/status`` of the daemon."""
        pid = self._workshop.podman("inspect", "--format={{.State.Pid}}", self.name).strip()
        lines = Path("/proc", pid, "status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def stop(self) -> tuple[float, int]:
        """Seconds until it has ended, and its exit status."""
        began = time.monotonic()
        self._workshop.podman("stop", "--time=10", self.name)
        took = time.monotonic() - began
        return took, int(self._workshop.podman("inspect", "--format={{.State.ExitCode}}", self.name))


MakeLab = Callable[..., Lab]
Start = Callable[..., tuple[Lab, Container]]


@pytest.fixture
def start(workshop: Workshop, built: list[str], make_lab: MakeLab) -> Iterator[Start]:
    """Two hosts: one runs the image, the other the daemon of this source tree."""
    started: list[Container] = []

    def begin(
        *options: str, before: Callable[[Lab], object] = lambda lab: None, **spec: object
    ) -> tuple[Lab, Container]:
        lab = make_lab(hosts=2, **spec)
        lab.up(daemons=False)
        directory = lab.host(1).directory
        (directory / "state").mkdir()
        (directory / "xtables.lock").touch()
        (directory / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        before(lab)
        lab.host(2).daemon.start()
        container = Container(workshop, lab, *options)
        started.append(container)
        lab.host(2).daemon.wait_ready()
        lab.attach_pods()
        return lab, container

    yield begin
    for container in started:
        workshop.podman("rm", "--force", "--time=0", container.name, check=False)


def pods_talk(lab: Lab) -> None:
    for one, other in ((1, 2), (2, 1)):
        lab.host(one).pod.run("ping", "-c1", "-W5", lab.host(other).pod_address())


def has_masquerade(lab: Lab, program: str) -> bool:
    return "FLANNEL-POSTRTG" in lab.host(1).run(f"{program}-save").stdout


@pytest.mark.kernel
@pytest.mark.etcd
@pytest.mark.needs("vxlan", "iptables")
def test_with_two_capabilities_and_a_read_only_root_it_joins_a_cluster(start: Start, tell: Tell) -> None:
    lab, container = start()
    pods_talk(lab)
    assert lab.host(1).subnet_env()["FLANNEL_MTU"] == "1450"
    assert container.ctl("health", "--ready") == (0, "flanneld is ready\n")
    status = container.status()
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 12 | 1 << 13, "NET_ADMIN and NET_RAW"
    tell(
        f"podman run: ready after {container.ready_s:.1f} s, resident {int(status['VmRSS'].split()[0]) / 1024:.0f} MiB"
    )
    listed, table = container.ctl("leases", f"--etcd-endpoints={lab.etcd.endpoints}")
    assert listed == 0
    own = re.search(r"^\* +(\S+) +198\.18\.0\.11", table, re.MULTILINE)
    assert own
    assert lab.host(1).subnet_env()["FLANNEL_SUBNET"].startswith(own[1].rpartition(".")[0])
    assert not re.search(r"^[WE]\d{4} .*", container.log(), re.MULTILINE), "nothing to warn of"
    took, code = container.stop()
    tell(f"podman stop: ended after {took:.1f} s with status {code}; the pods still talk")
    assert code == 0
    assert took < 5
    pods_talk(lab)


@pytest.mark.kernel
@pytest.mark.etcd
@pytest.mark.needs("vxlan", "iptables")
def test_the_health_check_of_the_image_says_whether_the_daemon_answers(
    start: Start, workshop: Workshop, tell: Tell
) -> None:
    _, container = start()
    assert workshop.status("healthcheck", "run", container.name)[0] == 0
    workshop.podman("kill", "--signal=STOP", container.name)
    try:
        assert workshop.status("healthcheck", "run", container.name)[0] != 0
    finally:
        workshop.podman("kill", "--signal=CONT", container.name)
    tell("podman healthcheck run: healthy; with the daemon stopped by SIGSTOP: unhealthy")


@pytest.mark.kernel
@pytest.mark.etcd
@pytest.mark.needs("vxlan", "iptables")
@pytest.mark.parametrize("variant", ["iptables-nft", "iptables-legacy"])
def test_its_rules_go_where_the_hosts_own_rules_are(start: Start, variant: str, tell: Tell) -> None:
    """Contract 10.6; failures F09."""
    rule = ("-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
    lab, container = start(before=lambda lab: lab.host(1).run(variant, *rule))
    pods_talk(lab)
    other = "iptables-legacy" if variant == "iptables-nft" else "iptables-nft"
    assert has_masquerade(lab, variant)
    assert not has_masquerade(lab, other)
    (said,) = re.findall(r"iptables variant chosen .* tool=(iptables-\S+)", container.log())
    tell(f"a rule of the host in {variant}, so ours: {said}")


@pytest.mark.kernel
@pytest.mark.etcd
@pytest.mark.needs("vxlan", "nft")
def test_with_nftables_it_makes_its_own_tables(start: Start, tell: Tell) -> None:
    lab, _ = start(config={"EnableNFTables": True})
    pods_talk(lab)
    tables = lab.host(1).run("nft", "list", "tables").stdout
    assert "flannel-ipv4" in tables
    tell(f"EnableNFTables: {', '.join(tables.splitlines())}")


@pytest.mark.kernel
@pytest.mark.etcd
@pytest.mark.needs("vxlan", "iptables")
def test_an_ordinary_user_can_run_it_where_the_runtime_hands_capabilities_on(start: Start, tell: Tell) -> None:
    """podman makes --cap-add ambient for another user than root; Kubernetes does not."""

    def give_directory(lab: Lab) -> None:
        directory = lab.host(1).directory
        for path in (directory, directory / "state", directory / "xtables.lock"):
            os.chown(path, 65532, 65532)

    lab, container = start("--user=flanneld", before=give_directory)
    pods_talk(lab)
    status = container.status()
    assert status["Uid"].split()[1] == "65532"
    assert has_masquerade(lab, "iptables-nft")
    tell(f"--user=flanneld: uid {status['Uid'].split()[1]}, capabilities {status['CapAmb']}, ready, pods talk")


# -- its other programs -------------------------------------------------------------------------------------


def test_install_conf_of_the_image_puts_a_file_in_place(workshop: Workshop, built: list[str], tmp_path: Path) -> None:
    """Contract 10.5, as the init container of Go flannel's manifest calls it."""
    (tmp_path / "cni-conf.json").write_text("{}")
    (tmp_path / "net.d").mkdir()
    words = ["--entrypoint=/opt/bin/install-conf", f"--volume={tmp_path}:{tmp_path}", IMAGE]
    assert workshop.run(*words, f"{tmp_path}/cni-conf.json", f"{tmp_path}/net.d/10-flannel.conflist")[0] == 0
    assert (tmp_path / "net.d/10-flannel.conflist").read_text() == "{}"
    assert workshop.run(*words)[0] == 1


def test_mk_docker_opts_of_the_image_reads_subnet_env(workshop: Workshop, built: list[str], tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text("FLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n")
    words = ["--entrypoint=/opt/bin/mk-docker-opts.sh", f"--volume={tmp_path}:{tmp_path}", IMAGE]
    assert workshop.run(*words, "-c", "-f", f"{tmp_path}/subnet.env", "-d", f"{tmp_path}/docker.env")[0] == 0
    assert '--bip=10.5.7.1/24 --ip-masq=false --mtu=1450"' in (tmp_path / "docker.env").read_text()


def test_the_other_words_of_the_programs_answer_without_network(workshop: Workshop, built: list[str]) -> None:
    assert workshop.run("--entrypoint=/opt/bin/flannelctl", IMAGE, "--version") == (0, f"flannelctl {__version__}\n")
    status, text = workshop.run(IMAGE, "--help")
    assert status == 0
    assert text.startswith("Usage: flanneld [flags]")
