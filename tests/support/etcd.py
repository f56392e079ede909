"""A real etcd for tests: one member or three, plain or TLS, with or without users, on its own loopback address.

Each cluster listens on random addresses of 127.0.0.0/8, so that test runs side by side never want the same port.
Data lie in memory where possible; members die with the test process, whatever happens to it.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import trustme

from flanneld.lab.etcd import binary
from flanneld.lab.netns import run_in

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


class Certificates:
    """A CA with a server and a client certificate, as files; ``issue`` replaces them in place."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.ca, self.cert, self.key = (str(directory / name) for name in ("ca.pem", "client.pem", "client.key"))
        self.server_cert, self.server_key = str(directory / "server.pem"), str(directory / "server.key")

    def issue(self, *server_names: str) -> Certificates:
        """Make a new CA and certificates of it, the server's for these names and addresses."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        server, client = authority.issue_cert(*server_names), authority.issue_cert("client.example")
        server.cert_chain_pems[0].write_to_path(self.server_cert)
        server.private_key_pem.write_to_path(self.server_key)
        client.cert_chain_pems[0].write_to_path(self.cert)
        client.private_key_pem.write_to_path(self.key)
        return self


class Member:
    """One etcd process."""

    def __init__(self, name: str, address: str, argv: Sequence[str], directory: Path, netns: str = "") -> None:
        self.name = name
        self.address = address
        self.netns = netns
        self._argv = [*enter(netns), *argv]
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, with the data it had; does not wait."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    def is_healthy(self) -> bool:
        """Whether it serves linearizable reads."""
        return run_in(self.netns, self._is_healthy) if self.netns else self._is_healthy()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}:2381/health", timeout=2) as answer:
                return b'"true"' in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def wait_healthy(self, timeout_s: float = 20.0) -> None:
        """Block until it serves."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            gone = self._process is None or self._process.poll() is not None
            if gone or time.monotonic() > deadline:
                raise AssertionError(f"etcd {self.name} does not serve:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let it neither run nor close its connections (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on after ``stop``."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


def enter(netns: str) -> list[str]:
    """What goes before a command that is to run in a namespace; nothing for our own."""
    return ["ip", "netns", "exec", netns] if netns else []


class Cluster:
    """A started cluster; a context manager that leaves nothing behind.

    Args:
        members: how many.
        certificates: serve TLS with these; reissued for the members' addresses.
        client_cert: refuse clients without a certificate of the CA.
        extra: more etcd flags.
        at: namespace and address of each member, instead of loopback.
    """

    def __init__(
        self,
        members: int = 1,
        *,
        certificates: Certificates | None = None,
        client_cert: bool = False,
        extra: Sequence[str] = (),
        at: Sequence[tuple[str, str]] = (),
    ) -> None:
        memory = "/dev/shm"
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-client-", dir=memory if os.path.isdir(memory) else None))
        net = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        places = list(at) or [("", f"{net}.{number}") for number in range(1, members + 1)]
        addresses = [address for _netns, address in places]
        self.home = places[0][0]
        """Namespace that ``ctl`` runs in."""
        self.scheme = "https" if certificates else "http"
        self.certificates = certificates
        flags = [*extra]
        if certificates:
            certificates.issue(*addresses)
            flags += [f"--cert-file={certificates.server_cert}", f"--key-file={certificates.server_key}"]
            if client_cert:
                flags += ["--client-cert-auth", f"--trusted-ca-file={certificates.ca}"]
        peers = ",".join(f"m{number}=http://{address}:2380" for number, address in enumerate(addresses))
        self.members = [
            Member(f"m{number}", address, [*self._argv(f"m{number}", address, peers), *flags], self.directory, netns)
            for number, (netns, address) in enumerate(places)
        ]

    def _argv(self, name: str, address: str, peers: str) -> list[str]:
        client, peer = f"{self.scheme}://{address}:2379", f"http://{address}:2380"
        return [
            *(binary("etcd"), f"--name={name}", f"--data-dir={self.directory / name}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster={peers}"),
            f"--listen-metrics-urls=http://{address}:2381",
            # one machine: elect quickly and do not wait for disks; check passwords cheaply
            *("--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync", "--bcrypt-cost=4"),
            "--log-level=warn",
        ]

    @property
    def endpoints(self) -> str:
        """Value for ``--etcd-endpoints``."""
        return ",".join(f"{self.scheme}://{member.address}:2379" for member in self.members)

    def __enter__(self) -> Cluster:
        try:
            for member in self.members:
                member.start()
            for member in self.members:
                member.wait_healthy()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Kill all members and delete their data."""
        for member in self.members:
            member.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def member(self, host: str) -> Member:
        """The member with an address."""
        return next(member for member in self.members if member.address == host)

    def ctl(self, *arguments: str, user: str = "") -> str:
        """Run ``etcdctl`` and return what it printed; a failure shows its error."""
        argv = [*enter(self.home), binary("etcdctl"), f"--endpoints={self.endpoints}", *arguments]
        if self.certificates:
            argv += [f"--cacert={self.certificates.ca}", f"--cert={self.certificates.cert}"]
            argv += [f"--key={self.certificates.key}"]
        if user:
            argv += [f"--user={user}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env={**os.environ, "ETCDCTL_API": "3"})
        assert done.returncode == 0, f"etcdctl {arguments}: {done.stderr}"
        return done.stdout

    def save(self, backup: Path) -> None:
        """Back the store up."""
        self.ctl("snapshot", "save", str(backup))

    def wipe(self) -> None:
        """Lose all data; for one of a single member."""
        [member] = self.members
        member.kill()
        shutil.rmtree(self.directory / member.name)
        member.start()
        member.wait_healthy()

    def restore(self, backup: Path) -> None:
        """What an operator does after losing a cluster; for one of a single member."""
        [member] = self.members
        member.kill()
        data, peer = self.directory / member.name, f"http://{member.address}:2380"
        shutil.rmtree(data)
        options = [f"--name={member.name}", f"--initial-cluster={member.name}={peer}", f"--data-dir={data}"]
        options += [f"--initial-advertise-peer-urls={peer}"]
        argv = [binary("etcdctl"), "snapshot", "restore", str(backup), *options]
        subprocess.run(argv, check=True, capture_output=True, timeout=20, env={**os.environ, "ETCDCTL_API": "3"})
        member.start()
        member.wait_healthy()

    def enable_auth(self, root_password: str, **users: str) -> None:
        """Switch authentication on; ``users`` are names and passwords of users that may do nothing yet."""
        for name, password in {"root": root_password, **users}.items():
            self.ctl("user", "add", f"{name}:{password}")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")

    def allow(self, user: str, prefix: str, root_password: str) -> None:
        """Let a user read and write below a prefix."""
        role, root = f"role-{user}", f"root:{root_password}"
        self.ctl("role", "add", role, user=root)
        self.ctl("role", "grant-permission", role, "--prefix=true", "readwrite", prefix, user=root)
        self.ctl("user", "grant-role", user, role, user=root)
