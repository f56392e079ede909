"""Builds the image with buildah and runs it with podman, both with their storage in one directory of the test's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flanneld import __version__
from tests.support import debian
from tests.support.programs import storage

SOURCE = Path(__file__).parents[2]
BASE = "localhost/debian-base"
IMAGE = "localhost/flanneld"
BUILD_S = 400.0
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000")
"""podman's own defaults are above what a machine that is itself a container may grant."""

DATE = 1767225600
"""2026-01-01, as SOURCE_DATE_EPOCH."""
LABELS = {"VERSION": __version__, "REVISION": "0123abc", "CREATED": "2026-01-01T00:00:00Z"}


class Workshop:
    """A place to build images and run containers in, which leaves nothing behind; a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._buildah = ["buildah", *storage(directory)]
        # containers' state is otherwise in /run/libpod, shared with whoever else uses podman on this machine
        self._podman = ["podman", *storage(directory), f"--tmpdir={directory}/tmp"]
        # no systemd to ask for cgroups; runc, because Debian 12's crun refuses hybrid cgroups
        self._podman += ["--cgroup-manager=cgroupfs", "--runtime=runc"]

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.podman("rm", "--all", "--force", check=False)
        self.buildah("rm", "--all", check=False)
        # what a killed container or build left mounted would keep its directory from going
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{self.directory}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)
        for cgroup in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
            with suppress(OSError):  # somebody else's containers are in it
                cgroup.rmdir()

    def buildah(self, *words: str, check: bool = True, timeout_s: float = 60.0) -> str:
        return _run([*self._buildah, *words], check, timeout_s)

    def podman(self, *words: str, check: bool = True, timeout_s: float = 60.0) -> str:
        return _run([*self._podman, *words], check, timeout_s)

    def status(self, *words: str) -> tuple[int, str]:
        """Exit status and whole output of a podman command."""
        done = subprocess.run([*self._podman, *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    def log(self, container: str) -> str:
        """What a container wrote to its standard error."""
        done = subprocess.run([*self._podman, "logs", container], capture_output=True, text=True, timeout=60)
        return done.stderr

    def make_base(self) -> str:
        """A stand-in for the base image of a registry: the same Debian, made here; says what it is.

        Raises:
            debian.NotMadeError: the Debian archive cannot be reached.
        """
        rootfs = debian.tarball(["ca-certificates"])
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(rootfs), "/", timeout_s=BUILD_S)
        self.buildah("commit", "--quiet", "--rm", container, BASE, timeout_s=BUILD_S)
        return f"Debian {debian.SUITE} by mmdebstrap, {rootfs.stat().st_size / 1e6:.0f} MB"

    def build(self, tag: str = IMAGE, *options: str) -> float:
        """Build the Dockerfile on that base; gives the seconds it took."""
        words = ["bud", "--pull-never", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={BASE}"]
        if Path(CA_BUNDLE).exists():  # this machine may trust a proxy that Debian does not
            words += [f"--volume={CA_BUNDLE}:/run/host-ca.crt:ro", "--build-arg=PIP_CERT=/run/host-ca.crt"]
        if index := os.environ.get("PIP_INDEX_URL"):
            words.append(f"--build-arg=PIP_INDEX_URL={index}")
        began = time.monotonic()
        self.buildah(*words, *options, f"--tag={tag}", str(self._source()), timeout_s=BUILD_S)
        return time.monotonic() - began

    def _source(self) -> Path:
        """A copy of what the Dockerfile is given, so that all builds are of the same, whoever edits meanwhile."""
        copy = self.directory / "source"
        if not copy.exists():
            copy.mkdir()
            given = re.findall(r"^!(\S+)$", (SOURCE / ".dockerignore").read_text(), re.MULTILINE)
            for name in ("Dockerfile", ".dockerignore", *given):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", SOURCE / name, copy / name], check=True, timeout=60)
        return copy

    def inspect(self, tag: str = IMAGE) -> dict[str, Any]:
        """What the image says of itself, and its size."""
        (found,) = json.loads(self.podman("image", "inspect", tag))
        return dict(found)

    @contextmanager
    def unpacked(self, tag: str = IMAGE) -> Iterator[Path]:
        """The image's root directory."""
        container = self.buildah("from", "--pull-never", tag).strip()
        yield Path(self.buildah("mount", container).strip())
        self.buildah("rm", container)

    def run(self, *words: str) -> tuple[int, str]:
        """Run the image to its end, without network; exit status and standard output."""
        return self.status(
            "run", "--rm", "--pull=never", "--network=none", "--read-only", "--cap-drop=all", *LIMITS, *words
        )


def build_ours(workshop: Workshop, tag: str = IMAGE, *options: str) -> float:
    """Build it as a release is: with a date and all labels; gives the seconds it took."""
    arguments = LABELS | {"SOURCE_DATE_EPOCH": str(DATE)}
    return workshop.build(tag, *(f"--build-arg={name}={value}" for name, value in arguments.items()), *options)


def _run(command: list[str], check: bool, timeout_s: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    return done.stdout
