"""Gathers what the image consists of: our programs, Python, nft and iptables, the libraries they need, nothing else.

Run by the Dockerfile in the build stage, on any Debian. Files are copied one by one from installed packages, so there
is no shell, no package tool and no compiler to leave out later, and each file is known by its package: those
packages are listed under /var/lib/dpkg/status.d, where scanners look, with their licences under /usr/share/doc.

usage: rootfs.py ROOT        (SOURCE_DATE_EPOCH gives all files their time)
"""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

SEEDS = (
    "/usr/bin/python3",
    "/usr/sbin/nft",
    *("/usr/sbin/ip*tables-nft*", "/usr/sbin/ip*tables-legacy*", "/usr/sbin/xtables-*-multi"),
    "/usr/lib/*-linux-gnu/xtables/*.so",
    "/lib/*-linux-gnu/libgcc_s.so.1",
    "/etc/ssl/certs/ca-certificates.crt",
    *("/etc/os-release", "/etc/debian_version", "/etc/nsswitch.conf"),
    "/usr/share/common-licenses/*",
)
"""libgcc_s is loaded by glibc when a thread ends, and named by no file. nsswitch.conf makes /etc/hosts go before DNS.

Not plain ``iptables``: it would be one of the two variants whatever the host uses. Without it the daemon goes by the
rules that it finds.
"""

GENERATED = {"/etc/ssl/certs/ca-certificates.crt": "ca-certificates", "/etc/nsswitch.conf": "base-files"}
"""Files that no package contains, because its installation makes them."""

NO_MODULE = re.compile(
    r"^(config-|distutils|dist-packages|sitecustomize|site-packages|ensurepip|idlelib|lib2to3|pydoc|test|tkinter|turtle|"
    r"unittest|venv|xmlrpc|wsgiref|curses|dbm|sqlite3|doctest|pdb|xml/|encodings/(big5|cp9|euc|gb|hz|iso2022|johab|shift)|"
    r"lib-dynload/(_codecs_|_multibyte|_ctypes_test|_test|_xx|xx|_curses|_dbm|_gdbm|_sqlite3|_tkinter|_bz2|_lzma|"
    r"audioop|nis|ossaudiodev|readline|_crypt|spwd|_uuid))"
)
"""Of the standard library: what is for people and for tests, and what would bring libraries with it."""

NO_FILE = re.compile(r"^bin/|\.(pyi|pyx|pxd|c|h)$|/_testcapi\.|^_?yaml/_yaml\.[^/]*so$")
"""Of the Python packages: what compilers and tests read, and PyYAML's 2.5 MB of C, which it can do without."""

USERS = "root:x:0:0:root:/:/none\nflanneld:x:65532:65532:flanneld:/:/none\n"
GROUPS = "root:x:0:\nflanneld:x:65532:\n"
DIRECTORIES = {"run": 0o755, "tmp": 0o1777, "proc": 0o555, "sys": 0o555, "dev": 0o755, "var/lib/flanneld": 0o755}
DIRECTORIES |= {"usr/share/doc/flanneld": 0o755}


def main() -> None:
    """Fill the directory that the command line names; the Python packages are in it already."""
    root = Path(sys.argv[1])
    for name, mode in DIRECTORIES.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    for name in ("bin", "sbin", "lib", "lib64"):  # as on every Debian since 12
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    trim(root / "opt/flanneld")
    copied = gather(root)
    (root / "etc/passwd").write_text(USERS)
    (root / "etc/group").write_text(GROUPS)
    compile_all(root)
    document(root, {package for path in copied if (package := owners().get(path))})
    stamp(root, float(os.environ.get("SOURCE_DATE_EPOCH", "0")))


def trim(packages: Path) -> None:
    """Take out of the Python packages what nobody runs."""
    for path in sorted(packages.rglob("*")):
        if path.is_dir():
            continue
        path.chmod(0o644)  # some wheels have programs where modules are meant
        if NO_FILE.search(path.relative_to(packages).as_posix()):
            path.unlink()
    (packages / "bin").rmdir()
    subprocess.run(["strip", "--strip-unneeded", *packages.rglob("*.so")], check=True)


def gather(root: Path) -> set[Path]:
    """Copy the seeds, the standard library, and the shared libraries of all of it, ours included."""
    copied: set[Path] = set()
    stdlib = Path(sysconfig.get_path("stdlib"))
    seeds = [path for pattern in SEEDS for path in sorted(Path("/").glob(pattern[1:]))]
    for path in (*seeds, *modules(stdlib)):
        copy(path, root, copied)
    binaries = [path for path in copied if is_binary(path)]
    ours = [path for path in (root / "opt").rglob("*.so*") if is_binary(path)]
    for library in libraries((*binaries, *ours)):
        copy(library, root, copied)
    return copied


def modules(stdlib: Path) -> Iterator[Path]:
    """The files of the standard library that the image gets."""
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        if path.is_file() and path.suffix in (".py", ".so") and not NO_MODULE.match(name):
            yield path


def libraries(binaries: Iterable[Path]) -> set[Path]:
    """All shared libraries that these need, and their needs in turn: ldd tells both."""
    said = subprocess.run(["ldd", *map(str, sorted(binaries))], capture_output=True, text=True, check=False).stdout
    if lost := re.findall(r"(\S+) => not found", said):
        sys.exit(f"rootfs: libraries are missing: {', '.join(sorted(set(lost)))}")
    return {Path(found) for found in re.findall(r"(?:=>|^)\s+(/\S+) \(0x", said, re.MULTILINE)}


def copy(path: Path, root: Path, copied: set[Path]) -> None:
    """Copy a file; of a link, each step down to the file."""
    path = place(path)
    if path in copied or path.is_dir():
        return
    copied.add(path)
    target = root / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(os.readlink(path))
        copy(path.parent / os.readlink(path), root, copied)
    else:
        shutil.copy2(path, target)


@cache
def _real(directory: Path) -> Path:
    return directory.resolve()


def place(path: Path) -> Path:
    """Where a file is, not following the last step: /lib/x.so is /usr/lib/x.so."""
    return _real(path.parent) / path.name


def is_binary(path: Path) -> bool:
    """Whether a file is a program or a shared library."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def compile_all(root: Path) -> None:
    """Byte-compile, since the image is read-only when it runs, and in a form that depends on the source alone.

    The standard library keeps only the compiled form, which halves it. Our code and our dependencies keep both, so
    that a traceback shows lines.
    """
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    stdlib = root / sysconfig.get_path("stdlib").lstrip("/")
    for directory, legacy in ((stdlib, True), (root / "opt/flanneld", False)):
        done = compileall.compile_dir(
            directory, quiet=1, stripdir=str(root), invalidation_mode=unchecked, legacy=legacy, force=True
        )
        if not done:
            sys.exit(f"rootfs: {directory} cannot be compiled")
    for source in stdlib.rglob("*.py"):
        source.unlink()


@cache
def owners() -> dict[Path, str]:
    """The Debian package that each installed file came from."""
    found = {Path(file): package for file, package in GENERATED.items()}
    for listing in Path("/var/lib/dpkg/info").glob("*.list"):
        package = listing.stem.partition(":")[0]
        for line in listing.read_text().splitlines():
            found[place(Path(line))] = package
    return found


def document(root: Path, packages: set[str]) -> None:
    """What dpkg knows of each package, and its licence."""
    status = root / "var/lib/dpkg/status.d"
    status.mkdir(parents=True)
    for package in sorted(packages):
        query = ["dpkg-query", "--status", package]
        (status / package).write_text(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
        licence = Path("/usr/share/doc", package, "copyright")
        target = root / licence.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(licence.resolve(), target)


def stamp(root: Path, moment: float) -> None:
    """Give everything one time, so that two builds give the same layer."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (moment, moment), follow_symlinks=False)


if __name__ == "__main__":
    main()
