"""Coming to a lease in a real etcd (contract 3.20-3.25, 3.40; failures F18, F19, F25, F27)."""

from __future__ import annotations

import asyncio
import logging

import pytest

from flanneld.errors import ConfigError
from flanneld.model.addr import Family
from flanneld.model.lease_codec import parse_key
from flanneld.sources.etcd_client import EtcdClient
from tests.support.hosts import MakeHost, Switch, attrs_of, family_conf, net_conf
from tests.support.wait import until

pytestmark = pytest.mark.etcd

CONF = net_conf(family_conf("10.5.0.0/16", 24))
DUAL = net_conf(family_conf("10.5.0.0/16", 24), family_conf("fd00:5::/48", 64))


async def keys(client: EtcdClient, root: str) -> dict[str, bytes]:
    """All that lies under the prefix of leases."""
    listing = await client.list(f"{root}/subnets".encode())
    return {kv.key.decode().rpartition("/")[2]: kv.value for kv in listing.kvs}


async def test_a_new_host_writes_flannels_key_and_value_and_lives_a_day(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    a = host(attrs_of("192.0.2.1", "id-a", backend_type="vxlan", data=b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'))
    own = await a.acquire(CONF)
    assert await keys(client, root) == {
        own.key: b'{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"FlanneldID":"id-a"}'
    }
    assert own.key == str(own.lease.subnet).replace("/", "-")
    assert 86390 <= await client.time_to_live(own.lease.ttl_id) <= 86400  # contract 3.19


async def test_a_restarted_host_gets_its_subnet_again_and_leaves_no_orphan(client: EtcdClient, host: MakeHost) -> None:
    first = await host(attrs_of("192.0.2.1", "id-a")).acquire(CONF)
    again = await host(attrs_of("192.0.2.1", "id-a")).acquire(CONF)
    assert again.key == first.key
    assert await client.time_to_live(first.lease.ttl_id) == -1  # contract 11.47


async def test_a_host_takes_over_what_go_flanneld_left(client: EtcdClient, root: str, host: MakeHost) -> None:
    lease = await client.grant(600)
    await client.put(f"{root}/subnets/10.5.77.0-24".encode(), b'{"PublicIP":"192.0.2.1","PublicIPv6":null}', lease)
    a = host(attrs_of("192.0.2.1", "id-a"))
    await a.acquire(CONF)
    assert await keys(client, root) == {
        "10.5.77.0-24": b'{"PublicIP":"192.0.2.1","PublicIPv6":null,"FlanneldID":"id-a"}'
    }
    assert await client.time_to_live(lease) > 0  # not ours to revoke: other keys may hang on it


async def test_the_previous_subnet_is_claimed_when_free(host: MakeHost) -> None:
    a, b = host(attrs_of("192.0.2.1", "id-a")), host(attrs_of("192.0.2.2", "id-b"))
    assert (await a.acquire(CONF, previous="10.5.72.1/24")).key == "10.5.72.0-24"  # contract 3.41
    assert (await b.acquire(CONF, previous="10.5.72.1/24")).key != "10.5.72.0-24"


async def test_a_host_whose_address_changed_while_down_keeps_its_subnet(host: MakeHost) -> None:
    first = await host(attrs_of("192.0.2.1", "id-a")).acquire(CONF)
    moved = host(attrs_of("192.0.2.99", "id-a"))
    again = await moved.acquire(CONF, previous=str(first.lease.subnet))
    assert again.key == first.key
    kv = await moved.key()
    assert kv is not None
    assert b"192.0.2.99" in kv.value


async def test_a_lease_outside_the_new_network_is_replaced(client: EtcdClient, root: str, host: MakeHost) -> None:
    old = await host(attrs_of("192.0.2.1", "id-a")).acquire(net_conf(family_conf("10.9.0.0/16", 24)))
    own = await host(attrs_of("192.0.2.1", "id-a")).acquire(CONF, previous=str(old.lease.subnet))
    assert list(await keys(client, root)) == [own.key]  # contract 12.13
    assert own.key.startswith("10.5.")


async def test_a_network_that_gains_ipv6_keeps_every_ipv4_subnet(client: EtcdClient, root: str, host: MakeHost) -> None:
    old = await host(attrs_of("192.0.2.1", "id-a")).acquire(CONF)
    await host(attrs_of("192.0.2.2", "id-b")).acquire(CONF)  # a lease without IPv6 present: contract 11.9
    own = await host(attrs_of("192.0.2.1", "id-a", "fd00::1")).acquire(DUAL)
    assert own.lease.subnet == old.lease.subnet
    assert own.lease.subnet6 is not None
    assert old.key not in await keys(client, root)


async def test_another_machine_with_our_address_keeps_its_lease_and_we_say_so(
    client: EtcdClient, root: str, host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure F19: all hosts on 10.0.2.15 shared one subnet."""
    first = await host(attrs_of("10.0.2.15", "id-a")).acquire(CONF)
    before = (await keys(client, root))[first.key]
    second = await host(attrs_of("10.0.2.15", "id-b")).acquire(CONF, previous=str(first.lease.subnet))
    assert second.key != first.key
    assert (await keys(client, root))[first.key] == before
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for part in ("id-a", "id-b", str(first.lease.subnet), "10.0.2.15", "--public-ip"):
        assert part in warning


async def test_twenty_hosts_at_once_get_the_twenty_subnets_there_are(host: MakeHost) -> None:
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=20))
    hosts = [host(attrs_of(f"192.0.2.{n}", f"id-{n}")) for n in range(20)]
    owns = await asyncio.gather(*(h.acquire(conf) for h in hosts))
    assert len({own.key for own in owns}) == 20  # contract 11.12


async def test_dual_stack_hosts_at_once_share_nothing_in_either_family(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    """The key names both subnets, so etcd itself does not prevent that one of them is given twice."""
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=8), family_conf("fd00:5::/48", 64, subnets=8))
    hosts = [host(attrs_of(f"192.0.2.{n}", f"id-{n}", f"fd00::{n}")) for n in range(1, 9)]
    await asyncio.gather(*(h.acquire(conf) for h in hosts))
    assert len({h.subnet(Family.V4) for h in hosts}) == 8
    assert len({h.subnet(Family.V6) for h in hosts}) == 8
    assert len(await keys(client, root)) == 8


async def test_ipv6_only_hosts_get_keys_of_their_own_that_go_can_read(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    conf = net_conf(None, family_conf("fd00:5::/48", 64))
    hosts = [host(attrs_of("", f"id-{n}", f"fd00::{n}")) for n in range(1, 4)]
    owns = await asyncio.gather(*(h.acquire(conf) for h in hosts))
    assert len({own.lease.subnet6 for own in owns}) == 3  # contract 3.24
    for key in await keys(client, root):
        assert key.startswith("0.0.0.0-0&fd00:5:")
        assert parse_key(key.encode())[0] is None


async def test_a_full_network_is_waited_for_with_one_line(
    client: EtcdClient, root: str, host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure F27."""
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=1))
    first = await host(attrs_of("192.0.2.1", "id-a")).acquire(conf)
    waiting = asyncio.create_task(host(attrs_of("192.0.2.2", "id-b")).acquire(conf))
    await until(lambda: "are taken" in caplog.text)
    assert not waiting.done()
    await client.delete(f"{root}/subnets/{first.key}".encode())
    assert (await asyncio.wait_for(waiting, 10)).key == first.key
    assert caplog.text.count("are taken") == 1


@pytest.mark.parametrize("name", ["10.0.0.0-8", "10.5.0.0-16&fd00:5::-64", "10.5.1.0-24&fd00::-16"])
async def test_a_key_that_holds_the_whole_network_keeps_no_dual_stack_host_out(
    client: EtcdClient, root: str, host: MakeHost, name: str
) -> None:
    """Its other half, where it is a subnet, is taken."""
    await client.put(f"{root}/subnets/{name}".encode(), b'{"PublicIP":"192.0.2.9","PublicIPv6":"fd00::9"}')
    a = host(attrs_of("192.0.2.1", "id-a", "fd00::1"))
    await asyncio.wait_for(a.run(DUAL), 10)
    assert a.subnet() != "10.5.1.0/24"
    assert a.subnet(Family.V6) != "fd00:5::/64"


async def test_in_a_store_that_lost_everything_a_newcomer_lets_hosts_that_run_go_first(
    host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure F16: every subnet looks free there until its owner has made its key again."""
    caplog.set_level(logging.INFO, "flanneld")
    late, owner = host(check_s=2.0), host(attrs_of("192.0.2.2", "id-b"), check_s=2.0)
    for one in (late, owner):
        one.store.expect("1000000")
    async with asyncio.timeout(10):
        assert (await owner.acquire(CONF, previous="10.5.72.1/24")).key == "10.5.72.0-24"
    waiting = asyncio.create_task(late.acquire(CONF))
    await until(lambda: "hosts that run write their leases again" in caplog.text)
    assert not waiting.done()
    assert (await asyncio.wait_for(waiting, 10)).key != "10.5.72.0-24"
    assert caplog.text.count("waiting for a lease") == 1 + caplog.text.count("no longer waiting for a lease")


async def test_a_range_without_subnets_is_refused_at_once(host: MakeHost) -> None:
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=0))
    with pytest.raises(ConfigError, match="SubnetMin"):
        await host(attrs_of("192.0.2.1", "id-a")).acquire(conf)


async def test_a_subnet_whose_value_cannot_be_read_is_not_free(client: EtcdClient, root: str, host: MakeHost) -> None:
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=2))
    await client.put(f"{root}/subnets/10.5.1.0-24".encode(), b"broken")
    own = await asyncio.wait_for(host(attrs_of("192.0.2.1", "id-a")).acquire(conf), 10)
    assert own.key == "10.5.2.0-24"  # contract 3.23


async def test_a_reservation_is_found_by_address_and_stays_without_etcd_lease(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    """Contract 3.40, 11.7: Go flanneld turns it into a lease of one day."""
    await client.put(f"{root}/subnets/10.5.40.0-24".encode(), b'{"PublicIP":"192.0.2.1"}')
    a = host(attrs_of("192.0.2.1", "id-a"), ttl_s=2, renew_margin_s=1.5, check_s=0.2)
    own = await a.run(CONF)
    assert (own.key, own.expires, own.lease.ttl_id) == ("10.5.40.0-24", None, 0)
    first = own.lease.revision
    await a.store.publish(attrs_of("192.0.2.7", "id-a"))
    published = a.own.revision
    assert published > first
    await until(lambda: a.own.revision > published, what="the PUT that heals Go peers")  # contract 13.4
    kv = await a.key()
    assert kv is not None
    assert kv.lease == 0
