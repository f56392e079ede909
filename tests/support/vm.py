"""Run a command on another kernel: Debian's, in qemu, with this machine's file system underneath.

The guest sees the whole file system read-only, with a memory overlay on top, so it has the same Python, tools and
source tree; nothing it writes reaches the host but one directory. Without hardware virtualisation it is slow (ten
times and more), so it tells right from wrong and never fast from slow. ``python -m tests.support.vm`` gets what is
needed, from the Debian archive, into ``CACHE``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(os.environ.get("FLANNELD_VM_DIR", Path.home() / ".cache" / "flanneld-vm"))
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "modprobe": "kmod", "cpio": "cpio"}
"""Program, and the Debian package it is in."""
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
GUEST_MEMORY = "768"
"""MiB."""

# Mounts the host's file system under an overlay and moves into it. switch_root, not chroot: the kernel loads modules
# by running /sbin/modprobe in its own root.
INIT = """#!/bin/sh
B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev
for m in $($B cat /order); do $B insmod /lib/$m; done
$B mkdir -p /lo /rw; O=trans=virtio,version=9p2000.L,msize=512000
$B mount -t 9p -o $O,ro,cache=loose root /lo
$B mount -t tmpfs t /rw; $B mkdir /rw/u /rw/w
$B mount -t overlay -o lowerdir=/lo,upperdir=/rw/u,workdir=/rw/w o /new
for a in $($B cat /proc/cmdline); do case $a in vm.modules=*) M=${a#vm.modules=};; esac; done
$B mkdir -p /new/lib/modules /new/vmout; $B ln -sfn $M /new/lib/modules/$($B uname -r)
$B mount -t 9p -o $O,rw out /new/vmout
for d in proc sys dev; do $B mount --move /$d /new/$d; done
$B mkdir -p /new/dev/pts /new/dev/shm; $B mount -t devpts p /new/dev/pts; $B mount -t tmpfs t /new/dev/shm
$B mount -t tmpfs t /new/run; $B cp /bin/busybox /new/run/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec $B switch_root /new /bin/sh -c '
  ip link set lo up
  sh /vmout/script >/vmout/log 2>&1; echo $? >/vmout/status
  sync; /run/busybox poweroff -f'
"""


class Result(NamedTuple):
    """How a command ended in the guest."""

    status: int
    log: str


def lacking() -> str:
    """Why no other kernel can be booted here; empty when one can."""
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)}; get it with: python -m tests.support.vm"
    return "" if _kernel() else f"no kernel in {CACHE}; get one with: python -m tests.support.vm"


def run(script: str, timeout_s: float) -> Result:
    """Boot, run a shell script as root, and give back its exit status and its output.

    Raises:
        AssertionError: the guest crashed or did not finish in time; what its console said is in it.
    """
    kernel = _kernel()
    assert kernel, lacking()
    release = kernel.name.removeprefix("vmlinuz-")
    modules = kernel.parent.parent / "lib" / "modules" / release
    with tempfile.TemporaryDirectory(prefix="flanneld-vm-") as folder:
        out = Path(folder)
        (out / "script").write_text(script)
        initrd = out / "initrd"
        initrd.write_bytes(_initrd(kernel.parent.parent, release, out / "tree"))
        machine = (
            "-machine q35,accel=tcg -cpu max -smp 2 -nodefaults -no-user-config -display none -no-reboot -net none"
        )
        shares = (
            f"-fsdev local,id=r,path=/,security_model=none,readonly=on,multidevs=remap "
            f"-device virtio-9p-pci,fsdev=r,mount_tag=root -fsdev local,id=o,path={out},security_model=none "
            f"-device virtio-9p-pci,fsdev=o,mount_tag=out"
        )
        append = f"console=ttyS0 quiet panic=-1 vm.modules={modules}"
        argv = ["qemu-system-x86_64", *machine.split(), "-m", GUEST_MEMORY, "-serial", "stdio", *shares.split()]
        argv += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
            console = done.stdout + done.stderr
        except subprocess.TimeoutExpired as exc:
            console = f"not done after {timeout_s} s\n{exc.stdout!r}"
        log = (out / "log").read_text(errors="replace") if (out / "log").exists() else ""
        status = out / "status"
        assert status.exists(), f"the guest did not come to an end\n{console[-2000:]}\n{log[-4000:]}"
        return Result(int(status.read_text()), log)


def _kernel() -> Path | None:
    return max(CACHE.glob("*/boot/vmlinuz-*"), default=None)


def _initrd(root: Path, release: str, tree: Path) -> bytes:
    """A first file system in memory: busybox, the modules for the real one, and ``INIT``."""
    for folder in ("bin", "dev", "proc", "sys", "new", "lib"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", tree / "bin" / "busybox")
    (tree / "bin" / "sh").symlink_to("busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    order: dict[str, None] = {}
    for module in BOOT_MODULES:
        for line in _output("modprobe", "-d", str(root), "-S", release, "--show-depends", module).splitlines():
            word, _, path = line.strip().partition(" ")
            if word == "insmod":
                order[path.split()[0]] = None
    for path in order:
        shutil.copy(path, tree / "lib")
    (tree / "order").write_text("\n".join(Path(path).name for path in order))
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    pack = ["cpio", "-o", "-H", "newc", "--quiet"]
    return subprocess.run(pack, input=names.encode(), cwd=tree, capture_output=True, check=True).stdout


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def fetch() -> None:
    """Install the tools and unpack Debian's kernel; needs apt and root."""
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], check=True)
    depends = _output("apt-cache", "depends", "linux-image-amd64")
    package = next(word for word in depends.split() if word.startswith("linux-image-") and word[12].isdigit())
    root = CACHE / package
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", package], cwd=root, check=True)
    (archive,) = root.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    archive.unlink()
    subprocess.run(["depmod", "-b", str(root), package.removeprefix("linux-image-")], check=True)


if __name__ == "__main__":
    fetch()
