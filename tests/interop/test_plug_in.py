"""The worked example of design/plug-ins.md: built as a wheel of its own, found and run by the daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flanneld

EXAMPLE = Path(flanneld.__file__).parent / "design" / "example-backend"

USE = """
import backends
from flanneld.model.host import ExtIface
from flanneld.model.addr import Family, Prefix, parse_ip
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.contracts import Surroundings
from flanneld.errors import ConfigError
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.state import State

def conf(router):
    return parse_netconf('{"Network":"10.5.0.0/16","Backend":{"Type":"Via-Router","Router":"%s"}}' % router)

backend = backends.create(conf("192.0.2.1"), {}, "0" * 32)
ext = ExtIface("eth0", 2, 1500, parse_ip("192.0.2.10"), None, parse_ip("192.0.2.10"), None)
path = backend.data_path(Surroundings(ext, {Family.V4: Prefix.parse("10.5.1.0/24")}, "", (), False))
lease = Lease(Prefix.parse("10.5.2.0/24"), None, LeaseAttrs(parse_ip("192.0.2.20"), None, "via-router"))
path.settle({"10.5.2.0-24": lease}, State(), {}, fill=True)
print(path.desired)
try:
    backends.create(conf("nonsense"), {}, "0" * 32)
except ConfigError as exc:
    print(exc)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built into a wheel and unpacked where only a path entry makes it visible."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path_factory.mktemp("source") / "example"
    source.mkdir()
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run(code: str, site: Path | None) -> str:
    extra = {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run([sys.executable, "-c", code], env=extra, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_routes_every_peer_through_its_router(installed: Path) -> None:
    route, complaint = run(USE, installed).splitlines()
    assert route == "route 10.5.2.0/24 via 192.0.2.1 dev eth0"
    assert complaint == 'Backend.Router is "nonsense": give the address of the router'


def test_without_the_package_the_type_is_unknown() -> None:
    code = USE.splitlines()
    tried = "\n".join(code[: code.index('backend = backends.create(conf("192.0.2.1"), {}, "0" * 32)')])
    tried += '\ntry:\n    backends.create(conf("192.0.2.1"), {}, "")\nexcept ConfigError as exc:\n    print(exc)\n'
    assert 'Backend.Type is "via-router", which is unknown: use one of' in run(tried, None)


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    info = tmp_path / "broken_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flanneld.backends]\nbroken = no_such_module:create\n")
    code = (
        "import backends\nfrom flanneld.errors import ConfigError\n"
        "from flanneld.model.netconf_parse import parse_netconf\n"
        'conf = parse_netconf(\'{"Network":"10.5.0.0/16","Backend":{"Type":"broken"}}\')\n'
        'try:\n    backends.create(conf, {}, "")\nexcept ConfigError as exc:\n    print(exc)\n'
    )
    told = run(code, tmp_path)
    assert told.startswith('backend "broken" of broken-backend cannot be loaded: ModuleNotFoundError')
