"""Names that an operator or a tool may have given, full of what shells, nft and iptables read: they stay names."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import backends
import flanneld
from tests.support.etcd_bed import CONFIG, EtcdBed

pytestmark = pytest.mark.kernel

PREFIX = (
    """/a"; }; add table ip evil; $(touch evil) `touch evil` 'x' \\ -j ACCEPT\n*nat\n-A POSTROUTING -j ACCEPT\n/b"""
)
IFACE = '"$(touch)`;|&"'
"""A device name may have any byte but blanks, slashes and colons, up to 15 of them."""


class Bed(EtcdBed):
    """A daemon whose prefix and interface have such names.

    Args:
        conf: keys of the network configuration.
        flags: of the daemon.
    """

    def __init__(self, conf: dict[str, object], *flags: str) -> None:
        super().__init__(1, flags=flags)
        self._conf = conf

    def configure(self, **more: object) -> None:
        self.host.run("ip", "link", "set", "eth0", "down")
        self.host.run("ip", "link", "set", "eth0", "name", IFACE)
        self.host.run("ip", "link", "set", IFACE, "up")
        self.etcd.ctl("put", f"{PREFIX}/config", json.dumps({**CONFIG, **self._conf, **more}))


@pytest.mark.etcd
@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
@pytest.mark.parametrize(
    "nftables",
    [
        pytest.param(True, marks=pytest.mark.needs("nft")),
        pytest.param(False, marks=pytest.mark.needs("iptables")),
    ],
)
def test_names_reach_kernel_files_and_tools_as_they_are_and_as_nothing_else(nftables: bool, backend: str) -> None:
    flags = (
        *(f"--etcd-prefix={PREFIX}", f"--iface={IFACE}", "--iface-regex=$(touch evil)", "--ip-masq"),
        *("--iptables-forward-rules=true", "-v=10"),
    )
    conf: dict[str, object] = {"EnableNFTables": nftables}
    conf["Backend"] = {"Type": backend, "x'; touch evil": "$(touch evil)"}
    with Bed(conf, *flags) as bed:
        tables = bed.host.run("sh", "-c", "nft list tables; iptables-save")
        assert "evil" not in tables
        assert "ACCEPT" not in "".join(re.findall(r"^-A POSTROUTING.*", tables, re.MULTILINE))
        if backend == "vxlan":
            [device] = json.loads(bed.host.run("ip", "-j", "link", "show", "flannel.1"))
            assert device["ifalias"] == f"flanneld {PREFIX}"
        assert "10.5.7.0-24" in bed.etcd.ctl("get", "--prefix", f"{PREFIX}/subnets/")
        assert not list(bed.directory.rglob("evil*"))
        assert not Path("evil").exists()
        # whatever is in a name, a record stays one line
        assert not [line for line in bed.log().splitlines() if not re.match(r"[DIWE]\d{4} |F", line)]


@pytest.mark.parametrize("package", [flanneld, backends])
def test_nothing_is_ever_run_through_a_shell(package: object) -> None:
    """Tools get their arguments as a list and their input on stdin (CONTRIBUTING)."""
    [root] = package.__path__  # type: ignore[attr-defined]
    found = []
    for path in Path(root).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if name in ("os.system", "os.popen", "eval", "exec") or name.endswith(
                ("create_subprocess_shell", "getoutput")
            ):
                found.append(f"{path.name}:{call.lineno} {name}")
            found += [f"{path.name}:{call.lineno} shell" for word in call.keywords if word.arg == "shell"]
    assert found == []
