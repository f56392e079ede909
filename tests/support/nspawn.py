"""A Debian that boots with systemd in a container (systemd-nspawn), and is gone afterwards whatever happens.

It has a kernel in common with this machine and a network of its own. Nothing of it is registered anywhere: no machined,
no image directory; one process tree below one control group, one temporary directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.support import debian
from tests.support.netns import Netns

BOOT_S, HALT_S, COMMAND_S = 60.0, 30.0, 60.0
CAPABILITIES = "CAP_NET_ADMIN,CAP_BPF"
SYSTEM_CALLS = "bpf @keyring"
"""Beyond nspawn's own choice; what a service in it may have is the unit's business. runc makes keyrings."""


class Machine:
    """A machine that can be booted several times; its disk stays in between.

    Args:
        root: its file system.
        binds: files and directories of this machine, and where they are seen in there, read-only.
    """

    def __init__(self, root: Path, binds: Mapping[Path, str]) -> None:
        self.root = root
        self._binds = [f"--bind-ro={here}:{there}" for here, there in binds.items()]
        self._name = f"flt-{secrets.token_hex(4)}"
        self._console = root.with_name(f"{root.name}.console")
        self._groups = [path / self._name for path in _control_groups()]
        self._process: subprocess.Popen[bytes] | None = None

    def boot(self) -> float:
        """Boot and wait until systemd has started everything; returns after how many seconds that was."""
        began = time.monotonic()
        # setpriv: a test run that is killed takes the machine with it
        argv = [
            "setpriv",
            "--pdeathsig=TERM",
            "systemd-nspawn",
            "--quiet",
            f"--directory={self.root}",
            f"--machine={self._name}",
            "--boot",
        ]
        argv += ["--register=no", "--keep-unit", "--link-journal=no", "--private-network", "--console=pipe"]
        argv += [f"--capability={CAPABILITIES}", f"--system-call-filter={SYSTEM_CALLS}", *self._binds]
        for group in self._groups:
            _make_group(group)
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self._groups)
        with self._console.open("wb") as console:
            # a session of its own, so that an interrupt of the test run leaves the clean way down to us
            self._process = subprocess.Popen(
                ["sh", "-euc", f'{join} exec "$@"', "sh", *argv],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = began + BOOT_S
        while self._state() not in ("running", "degraded"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the machine does not boot:\n{self._console.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - began

    def halt(self, cleanly: bool = True) -> None:
        """Shut down as a power button does; by force if it takes too long, or when ``cleanly`` does not matter."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            while not cleanly and self._process.poll() is None:  # for nspawn the second signal means at once
                time.sleep(0.05)
                self._process.terminate()
            self._process.wait(HALT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for group in self._groups:
            _remove_group(group)

    def run(self, *argv: str, stdin: str = "", check: bool = True) -> str:
        """Run a command in the booted machine; returns what it wrote.

        Args:
            argv: program and arguments.
            stdin: its input.
            check: whether a status other than 0 fails the test.
        """
        done = subprocess.run(
            [*self._enter(), *argv],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def sh(self, script: str, check: bool = True) -> str:
        """Run a shell script in the booted machine; returns what it wrote."""
        return self.run("sh", "-euc", script, check=check)

    def plug(self, segment: Netns, bridge: str, name: str) -> None:
        """Give the booted machine a network card, ``eth0``, on a bridge; it goes with the machine.

        Args:
            segment: namespace that the bridge is in.
            bridge: its name.
            name: of the bridge's end of the cable.
        """
        end = ["ip", "link", "add", name, "master", bridge, "up", "type", "veth"]
        segment.run(*end, "peer", "name", "eth0", "netns", str(self._leader()))

    def delegate(self) -> None:
        """Let the booted machine run containers: with cgroup v1 nspawn shows it its controllers read-only."""
        if Path("/sys/fs/cgroup/cgroup.procs").exists():
            return
        ours = {group.parts[4] for group in self._groups}
        for name in self.run("ls", "/sys/fs/cgroup").split():
            mount = f"/sys/fs/cgroup/{name}"
            self.sh(f"mount -o remount,bind,rw {mount}" if name in ours else f"umount {mount}")

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command in the booted machine; the caller ends it."""
        return subprocess.Popen([*self._enter(), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _enter(self) -> Sequence[str]:
        leader = self._leader()
        assert leader, "the machine does not run"
        # its root and an environment of its own; the host's PATH may lack sbin
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return ["nsenter", f"--target={leader}", "--all", "--root", "--wd", "--", "env", "-i", path, "LC_ALL=C.UTF-8"]

    def _leader(self) -> int:
        """The first process in there, as a process of this machine; 0 before there is one."""
        if self._process is None:
            return 0
        pid = self._process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return 0
        return int(children[-1]) if children else 0

    def _state(self) -> str:
        if not self._leader():
            return ""
        return self.run("systemctl", "is-system-running", check=False).strip()


def _control_groups() -> list[Path]:
    """This process's own place in each hierarchy of control groups.

    nspawn makes its groups below the one it runs in, always by the same names, so two at once need two groups. A
    controller of cgroup v1 in which somebody has put this process into a group is left alone.
    """
    root, found = Path("/sys/fs/cgroup"), []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, kind, path = line.split(":", 2)
        unified = root / "unified" if (root / "unified").exists() else root
        mount = root / kind.removeprefix("name=") if kind else unified
        if mount.is_dir() and (path == "/" or kind in ("", "name=systemd")):
            found.append(mount / path.lstrip("/"))
    return found


def _make_group(group: Path) -> None:
    group.mkdir(exist_ok=True)
    for name in ("cpuset.cpus", "cpuset.mems"):  # in cgroup v1 a new one has none, and takes no process
        if group.parts[4] == "cpuset":
            (group / name).write_text((group.parent / name).read_text())


def _remove_group(group: Path) -> None:
    """End whatever is left in a control group and remove it."""
    inner = sorted((path for path in group.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
    for path in [*inner, group]:
        deadline = time.monotonic() + HALT_S
        while path.exists():
            for pid in (path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                path.rmdir()
            except OSError:  # its processes are not gone yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@contextlib.contextmanager
def machines(
    folder: Path, names: Iterable[str], packages: Sequence[str], binds: Mapping[Path, str]
) -> Iterator[dict[str, Machine]]:
    """Several such, not booted yet, which share what none of them changes, since unpacking takes half a minute."""
    lower = debian.unpack(folder / "lower", packages)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, lower)
        made = {}
        for name in names:
            made[name] = Machine(stack.enter_context(_overlay(lower, folder / name)), binds)
            stack.callback(made[name].halt, cleanly=False)
        yield made


@contextlib.contextmanager
def _overlay(lower: Path, folder: Path) -> Iterator[Path]:
    """A directory that shows another one, and keeps changes to itself."""
    paths = {name: folder / name for name in ("upper", "work", "root")}
    for path in paths.values():
        path.mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={paths['upper']},workdir={paths['work']}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, paths["root"]], check=True)
    try:
        # an overlay cannot be a layer of another one
        with (paths["root"] / "etc/fstab").open("a") as fstab:
            fstab.writelines(f"tmpfs /var/lib/{name} tmpfs defaults 0 0\n" for name in ("docker", "containerd"))
        yield paths["root"]
    finally:
        subprocess.run(["umount", paths["root"]], check=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def machine(folder: Path, packages: Sequence[str], binds: Mapping[Path, str]) -> Iterator[Machine]:
    """A Debian with these packages, not booted yet; below ``folder`` while it is needed."""
    root = debian.unpack(folder / "root", packages)
    made = Machine(root, binds)
    try:
        yield made
    finally:
        made.halt()
        shutil.rmtree(root)
