"""The container image: built with buildah and looked into (contract 10.6)."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from flanneld import __version__
from tests.support.image import DATE, IMAGE, LABELS, SOURCE, Workshop, build_ours
from tests.support.tell import Tell

pytestmark = [pytest.mark.needs("debian", "buildah", "podman"), pytest.mark.timeout(600)]

SIZE_MB = 48
"""More than this is something that came in unnoticed."""


@pytest.fixture(scope="module")
def root(workshop: Workshop, built: list[str]) -> Iterator[Path]:
    """The root directory of the image."""
    with workshop.unpacked() as directory:
        yield directory


# -- what is in it ------------------------------------------------------------------------------------------


def test_it_builds_and_is_small(workshop: Workshop, built: list[str], root: Path, tell: Tell) -> None:
    size = workshop.inspect()["Size"] / 1e6
    for line in built:
        tell(line)
    tell(f"{size:.1f} MB, {sum(path.is_file() for path in root.rglob('*'))} files, one layer of files")
    assert size < SIZE_MB


def test_it_says_what_it_is_and_how_it_is_run(workshop: Workshop, built: list[str]) -> None:
    config = workshop.inspect()["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == LABELS["REVISION"]
    assert labels["org.opencontainers.image.created"] == LABELS["CREATED"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"] == "localhost/debian-base"
    assert config["Entrypoint"] == ["/opt/bin/flanneld"]
    assert config["StopSignal"] == "SIGTERM"
    assert workshop.inspect()["Healthcheck"]["Test"] == ["CMD", "/opt/bin/flannelctl", "health"]


def test_there_is_no_shell_package_tool_or_compiler_in_it(root: Path, tell: Tell) -> None:
    programs = sorted(str(path.relative_to(root)) for path in root.rglob("*") if is_program(path))
    tell("programs: " + " ".join(programs))
    assert set(programs) == {
        *(f"opt/bin/{name}" for name in ("flanneld", "flannelctl", "install-conf", "mk-docker-opts.sh")),
        *("usr/bin/python3.11", "usr/sbin/nft", "usr/sbin/xtables-legacy-multi", "usr/sbin/xtables-nft-multi"),
    }
    names = {path.name.partition("-")[0] for path in root.rglob("*")}
    assert not names & {"pip", "setuptools", "wheel", "ensurepip", "distutils"}


def is_program(path: Path) -> bool:
    is_file = path.is_file() and not path.is_symlink()
    return is_file and bool(path.stat().st_mode & 0o111) and ".so" not in path.name


def test_nothing_in_it_is_setuid_or_writable_by_others(root: Path) -> None:
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        assert not mode & (stat.S_ISUID | stat.S_ISGID), path
        assert path.is_symlink() or not mode & stat.S_IWOTH or path == root / "tmp", path


def test_all_is_compiled_so_that_no_start_compiles_anything(root: Path) -> None:
    assert not list((root / "usr/lib/python3.11").rglob("*.py")), "the standard library is there in compiled form only"
    for source in (root / "opt/flanneld").rglob("*.py"):
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        # flag 1: valid by itself, never compared with the source (PEP 552)
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", source


def test_every_module_that_our_code_imports_is_in_it(workshop: Workshop, root: Path, tell: Tell) -> None:
    """Also those that are imported late, by some command or after some error."""
    wanted = sorted({name for source in own_sources(root) for name in imports(source)})
    program = f"import sys; sys.path.insert(0, '/opt/flanneld')\nfor name in {wanted}: __import__(name)"
    command = ["--entrypoint=/usr/bin/python3", IMAGE, "-BIS", "-c", program]
    assert workshop.run(*command) == (0, "")
    tell(f"{len(wanted)} modules imported in the image")


def own_sources(root: Path) -> list[Path]:
    own = [path for package in ("flanneld", "backends") for path in (root / "opt/flanneld" / package).rglob("*.py")]
    # the lab needs the extra [lab], which the image has not
    return [path for path in own if "lab" not in (path.parent.name, path.parent.parent.name, path.stem)]


def imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


# -- bill of materials --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bill(root: Path) -> dict[str, str]:
    """Package URL without qualifiers, and where the bill says its licence is."""
    document = json.loads((root / "usr/share/doc/flanneld/sbom.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    everything = [document["metadata"]["component"], *document["components"]]
    return {
        one["purl"].partition("?")[0]: one.get("properties", [{"value": ""}])[0]["value"]
        for one in everything
        if one["licenses"][0]["license"]["name"]
    }


def test_the_bill_lists_every_python_package_with_the_locked_version(bill: dict[str, str]) -> None:
    listed = {purl for purl in bill if purl.startswith("pkg:pypi/")}
    lock = (SOURCE / "deploy/image/requirements.lock").read_text()
    locked = {f"pkg:pypi/{name}@{version}" for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)}
    assert listed == locked | {f"pkg:pypi/flanneld@{__version__}"}


def test_the_bill_lists_a_debian_package_for_every_library(bill: dict[str, str], root: Path, tell: Tell) -> None:
    debian_packages = {unquote(purl.split("/")[2].partition("@")[0]) for purl in bill if ":deb/" in purl}
    tell(f"bill of materials: {len(bill)} packages, {len(debian_packages)} of them Debian's")
    assert {"libc6", "libssl3", "nftables", "iptables", "python3.11-minimal", "ca-certificates"} <= debian_packages
    assert debian_packages == {path.name for path in (root / "var/lib/dpkg/status.d").iterdir()}


def test_the_licence_of_everything_in_the_bill_is_in_the_image(bill: dict[str, str], root: Path) -> None:
    for purl, files in bill.items():
        texts = [root / file.removeprefix("/") for file in files.split(", ")]
        assert files, purl
        assert all(text.read_text(errors="replace").strip() for text in texts), purl
    assert (root / "usr/share/common-licenses/GPL-2").exists()


# -- building it again --------------------------------------------------------------------------------------


def test_a_second_build_gives_the_same_layer(workshop: Workshop, root: Path, tell: Tell) -> None:
    seconds = build_ours(workshop, "localhost/again", "--no-cache")
    with workshop.unpacked("localhost/again") as again:
        first, second = contents(root), contents(again)
    assert second == first
    assert {int(line.split()[1]) for line in first.values()} == {DATE}
    layers = workshop.inspect("localhost/again")["RootFS"]["Layers"]
    assert layers == workshop.inspect()["RootFS"]["Layers"]
    tell(f"built again without cache, in {seconds:.0f} s: the same layer {layers[0][:19]}, {len(first)} files")


def contents(root: Path) -> dict[str, str]:
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        what = os.readlink(path) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = f"{status.st_mode:o} {status.st_mtime:.0f} {what}"
    return found


# -- the Dockerfile -----------------------------------------------------------------------------------------


@pytest.mark.needs("hadolint")
def test_hadolint_finds_nothing_in_the_dockerfile(tell: Tell) -> None:
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([lint, "--no-color", SOURCE / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.returncode == 0
    version = subprocess.run([lint, "--version"], capture_output=True, text=True, timeout=60).stdout.strip()
    tell(f"{version}: nothing found")
