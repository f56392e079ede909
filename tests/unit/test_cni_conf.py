"""CNI configuration lists, byte for byte: contract 10.8 and 10.11 to 10.14."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flanneld.model.addr import Prefix
from flanneld.model.cni_conf import is_rendered, render
from flanneld.model.subnet_env import SubnetEnv
from tests.support.flannel_plugin import delegated

V4 = (Prefix.parse("10.244.0.0/16"), Prefix.parse("10.244.7.0/24"))
V6 = (Prefix.parse("fd00:244::/48"), Prefix.parse("fd00:244:0:7::/64"))
ENVS = {
    "IPv4": SubnetEnv(*V4, None, None, 1450, True),
    "dual stack": SubnetEnv(*V4, *V6, 1430, True),
    "IPv6 only": SubnetEnv(None, None, *V6, 1430, True),
    "the plugin masquerades": SubnetEnv(*V4, *V6, 1430, False),
}

FLANNEL_FORM = b"""\
{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"""

BRIDGE_FORM = b"""\
{
  "name": "cbr0",
  "cniVersion": "0.4.0",
  "disableCheck": true,
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "isDefaultGateway": true,
      "hairpinMode": true,
      "ipMasq": false,
      "mtu": 1430,
      "ipam": {
        "type": "host-local",
        "ranges": [
          [
            {
              "subnet": "10.244.7.0/24"
            }
          ],
          [
            {
              "subnet": "fd00:244:0:7::/64"
            }
          ]
        ],
        "routes": [
          {
            "dst": "10.244.0.0/16"
          },
          {
            "dst": "fd00:244::/48"
          }
        ]
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"""


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_flannel_form_is_kube_flannels_for_every_subnet(env: SubnetEnv) -> None:
    """Contract 10.8; all that differs between hosts the plugin reads from subnet.env."""
    assert render("flannel", env) == FLANNEL_FORM


def test_bridge_form_names_subnets_networks_and_mtu() -> None:
    assert render("bridge", ENVS["dual stack"]) == BRIDGE_FORM


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_bridge_form_asks_for_what_flannels_plugin_would_have_asked_for(env: SubnetEnv, tmp_path: Path) -> None:
    """So an operator who changes the form changes nothing for containers (contract 10.13, 10.14)."""
    subnet_file = tmp_path / "subnet.env"
    subnet_file.write_bytes(env.render())
    ours, classic = json.loads(render("bridge", env)), json.loads(render("flannel", env))
    by_plugin = delegated(classic, subnet_file)
    by_plugin["plugins"][0]["bridge"] = "cni0"  # the bridge plugin's default
    assert ours["plugins"] == by_plugin["plugins"]
    # host-local keeps addresses under the network's name: another one would give out those of running pods again
    assert ours["name"] == classic["name"]


def test_subnet_with_host_bits_gives_a_range_without() -> None:
    env = SubnetEnv(V4[0], Prefix.parse("10.244.7.9/24"), None, None, 1450, True)
    assert render("bridge", env) == render("bridge", ENVS["IPv4"])


def test_flannel_form_names_a_subnet_file_that_its_plugin_would_not_find() -> None:
    """Contract 10.11."""
    conf = json.loads(render("flannel", ENVS["IPv4"], "/run/blue/subnet.env"))
    assert conf["plugins"][0]["subnetFile"] == "/run/blue/subnet.env"


@pytest.mark.parametrize("form", ["bridge", "flannel"])
def test_second_network_has_a_name_and_a_bridge_of_its_own(form: str) -> None:
    conf = json.loads(render(form, ENVS["IPv4"], "/run/blue/subnet.env", name="blue", bridge="cni1"))
    plugin = conf["plugins"][0]
    assert (conf["name"], plugin.get("delegate", plugin)["bridge"]) == ("blue", "cni1")


@pytest.mark.parametrize("form", ["bridge", "flannel"])
@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_own_work_is_known_again_whatever_its_subnet(form: str, env: SubnetEnv) -> None:
    assert is_rendered(render(form, env))
    assert is_rendered(render(form, env, "/run/blue/subnet.env", name="blue", bridge="cni1"))
    assert is_rendered(json.dumps(json.loads(render(form, env))).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 100,
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        BRIDGE_FORM[:-3],
        BRIDGE_FORM.replace(b"0.4.0", b"1.0.0"),
        BRIDGE_FORM.replace(b'"isGateway": true', b'"isGateway": false'),
        FLANNEL_FORM.replace(b'"type": "portmap"', b'"type": "bandwidth"'),
        FLANNEL_FORM.replace(b'"hairpinMode"', b'"forceAddress": true, "hairpinMode"'),
    ],
    ids=lambda text: text[:20].decode(errors="replace") + f" … {len(text)}",
)
def test_anything_else_is_somebody_elses_work(text: bytes) -> None:
    assert not is_rendered(text)
