"""Everything that reads bytes from somebody else, as functions of bytes: what both fuzzers call.

A target returns when the input was taken or was refused as documented: by its own kind of error, one printable
sentence of bounded length. Anything else that it raises is a find.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h11
from google.protobuf.message import DecodeError, Message
from grpclib.const import Status

from backends import udp, vxlan
from backends.udp_packet import complete_checksum, destination, fault, net_unreachable, take_hop
from flanneld.cli_flags import DAEMON_FLAGS, daemon_options
from flanneld.ctl import daemon_view
from flanneld.ctl.docker_opts import read_env
from flanneld.ctl.lease_view import View, as_json, details
from flanneld.errors import ConfigError, FlannelError, KernelError, PeerDataError, Unavailable, UsageError
from flanneld.goflags import scan
from flanneld.kernel import link_codec, neigh_codec, nft, nlmsg, route_codec, xtables
from flanneld.kernel.nft_events import _attributes, _messages, _table_and_chain
from flanneld.model import cni_conf, remembered, subnet_env
from flanneld.model.addr import IP, MAC, Family, Prefix
from flanneld.model.lease import Lease
from flanneld.model.lease_codec import decode_attrs, encode_attrs, parse_key, render_key
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.node_codec import Node, decode_event, decode_node, decode_page
from flanneld.model.node_lease import Annotations, bad_overwrites, changes, lease_of, operator_addresses
from flanneld.plan import traffic_iptables, traffic_nft
from flanneld.plan.claim import tunnel_ends
from flanneld.plan.fold import Remote
from flanneld.plan.traffic import TrafficRules
from flanneld.report import state_file, systemd
from flanneld.report.audit import Audit
from flanneld.report.control import Control
from flanneld.report.pages import Page, PageServer
from flanneld.report.state_dir import SUBNETS
from flanneld.report.table import render_table
from flanneld.sources import etcd_client, kube_config, kube_http, kube_watch, kube_wire
from flanneld.sources import etcd_pb2 as pb
from flanneld.sources.etcd_client import parse_endpoints
from flanneld.sources.etcd_endpoint import Endpoint
from flanneld.sources.etcd_wire import Refused

LONGEST = 2500
"""Characters of a sentence: 280 of the input may be quoted, each as an escape of up to six."""

SUBNET = Prefix.parse("10.5.2.0/24")
OWN_MAC = MAC(bytes((2, 0, 0, 0, 0, 1)))
NAMES = Annotations.of_prefix("flannel.alpha.coreos.com")
RULES = TrafficRules(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.1.0/24"), True, True, True)
LINKS = {number: f"flannel.{number}" for number in range(4)}


class WrongSentenceError(AssertionError):
    """An error as documented, whose text is not."""


@contextlib.contextmanager
def refused_by(*kinds: type[Exception]) -> Iterator[None]:
    """Let the documented errors pass if their text is fit for a log."""
    try:
        yield
    except kinds as error:
        text = str(error)
        if isinstance(error, FlannelError) and (not text or len(text) > LONGEST or not text.isprintable()):
            raise WrongSentenceError(f"{type(error).__name__}: {text[: 2 * LONGEST]!r}") from error


def text_of(raw: bytes) -> str:
    """Bytes as the operating system hands text to us."""
    return raw.decode("utf-8", "surrogateescape")


# ---- leases -------------------------------------------------------------------------------------------


def lease_key(raw: bytes) -> None:
    """A key below ``subnets/``."""
    with refused_by(PeerDataError):
        subnets = parse_key(raw)
        with refused_by(ConfigError):
            assert parse_key(render_key(*subnets).encode()) == subnets
    details(View.of(raw.decode("utf-8", "backslashreplace"), b"{}"))


def lease_value(raw: bytes) -> None:
    """A lease's value, and everybody who reads what is left raw in it."""
    view = View.of("10.5.2.0-24", raw)
    details(view)
    json.dumps(as_json(view))
    with refused_by(PeerDataError):
        attrs = decode_attrs(raw)
        assert decode_attrs(encode_attrs(attrs))._replace(data=b"", data6=b"") == attrs._replace(data=b"", data6=b"")
        assert remembered._row("10.5.2.0-24", Lease(SUBNET, None, attrs))
        tunnel_ends(attrs)
        backend_data(attrs.data)


def backend_data(raw: bytes) -> None:
    """What a backend reads of a peer."""
    udp.takes_unfinished_checksums(raw)
    with refused_by(PeerDataError):
        vxlan.parse_peer(Remote(SUBNET, IP(b"\xc6\x12\x00\x02"), raw, 1), OWN_MAC)


def memory(raw: bytes) -> None:
    """The file that remembers leases, as it is and with the right checksum."""
    for content in (raw, raw + b"sha256:" + hashlib.sha256(raw).hexdigest().encode() + b"\n"):
        with refused_by(ValueError):
            found = remembered.decode(content)
            for read in (found.own, found.operator, found.leases):
                with refused_by(ValueError):
                    read()


# ---- Kubernetes -----------------------------------------------------------------------------------------


def node(raw: bytes) -> None:
    """A node, an event, a page."""
    for decode in (decode_event, decode_page):
        with refused_by(ValueError):
            decode(raw)
    with refused_by(ValueError):
        _use(decode_node(raw))


def _use(found: Node) -> None:
    with refused_by(PeerDataError):
        lease_of(found, NAMES, kube_watch.revision_of(found.metadata.resource_version))
    with refused_by(PeerDataError):
        operator_addresses(found, NAMES)
    for sentence in bad_overwrites(found.annotations, NAMES):
        assert len(sentence) < LONGEST
    found.condition("NetworkUnavailable")
    attrs = decode_attrs(b'{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VNI":1}}')
    changes(attrs, found.annotations, NAMES)


def watch(raw: bytes) -> None:
    """What comes over a watch, cut anywhere: the first byte says where."""
    size = (raw[0] if raw else 0) % 40 + 1

    async def pieces() -> Iterator[bytes]:  # type: ignore[misc]
        for at in range(1, len(raw), size):
            yield raw[at : at + size]

    async def read() -> None:
        with refused_by(Unavailable):
            async for lines in kube_watch._in_lines(pieces(), 5.0):  # type: ignore[arg-type]
                for line in lines:
                    with refused_by(ValueError):
                        decode_event(line)

    _run(read())


class _Sink(asyncio.Transport):
    """Takes everything, tells nothing."""

    def write(self, data: object) -> None: ...
    def writelines(self, list_of_data: object) -> None: ...
    def write_eof(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool:
        return True  # or asyncio warns of writers that nobody closed

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default


def _stream(raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 16)
    reader.feed_data(raw)
    reader.feed_eof()
    protocol = asyncio.StreamReaderProtocol(reader)
    return reader, asyncio.StreamWriter(_Sink(), protocol, reader, loop)


def http_answer(raw: bytes) -> None:
    """An API server's answer: head and body."""

    async def talk() -> None:
        wire = kube_wire.Wire("https://server", *_stream(raw))
        with refused_by(Unavailable):
            head = await wire.ask("GET", "/api/v1/nodes", [("Host", "server")], b"", 5.0)
            assert math.isfinite(kube_http._retry_after_s(head))
            body = await wire.body(1 << 16, 5.0)
            reason, message = kube_http._status_of(bytes(body))
            assert len(reason) + len(message) < LONGEST
            assert message.isprintable()
            wire.finish()

    _run(talk())


def kubeconfig(raw: bytes) -> None:
    """A kubeconfig file."""
    with refused_by(ConfigError):
        token = kube_config.read_kubeconfig(_file(raw)).token
        if token:  # else none is sent
            h11.Request(method="GET", target="/x", headers=[("Host", "x"), ("Authorization", f"Bearer {token}")])


def etcd_answer(raw: bytes) -> None:
    """A message of etcd's, up to leases; and its words, when it refuses something."""
    for kind in (pb.RangeResponse, pb.TxnResponse, pb.WatchResponse, pb.AuthenticateResponse):
        with contextlib.suppress(DecodeError):
            _use_answer(kind.FromString(raw))
    refusal = Refused(Endpoint("http", "192.0.2.1", 2379), Status.INTERNAL, raw.decode(errors="replace"))
    for text in (str(refusal), refusal.message, refusal.reason):
        assert text.isprintable()
        assert len(text) < 4 * LONGEST


def _use_answer(found: Message) -> None:
    kvs: Sequence[pb.KeyValue] = ()
    if isinstance(found, pb.RangeResponse):
        kvs = found.kvs
    elif isinstance(found, pb.WatchResponse):
        kvs = [event.kv for event in found.events]
    for kv in etcd_client._kvs(kvs, etcd_client.VALUE_BYTES):
        with refused_by(PeerDataError):
            parse_key(kv.key)
            decode_attrs(kv.value)


def audit_answer(raw: bytes) -> None:
    """A repair whose object somebody gave a name, on its way from the daemon to somebody's terminal."""
    audit = Audit(lambda: 0.0)
    audit.note("link", raw.decode(errors="replace"), by=raw.decode("utf-8", "backslashreplace"))
    page = Control(Path("/"), dict, audit)._answer(b"/audit").body
    [entry] = daemon_view.entries_of(page)
    assert entry["text"] == raw.decode(errors="replace")
    assert render_table(("A", "B", "C", "D"), [daemon_view._row(entry)]).count("\n") == 1


# ---- the operator's -------------------------------------------------------------------------------------


def netconf(raw: bytes) -> None:
    """The network configuration, with each backend's part of it."""
    with refused_by(ConfigError):
        conf = parse_netconf(raw)
        for parse in (vxlan.parse_conf, udp.parse_conf):
            with refused_by(ConfigError):
                parse(conf)


def flags(raw: bytes) -> None:
    """A command line, words separated by NUL, and one variable."""
    words = [text_of(word) for word in raw.split(b"\0")]
    with refused_by(UsageError):
        daemon_options(scan(words, DAEMON_FLAGS).values, {})
    for flag in DAEMON_FLAGS[len(raw) % len(DAEMON_FLAGS) :][:1]:
        with refused_by(UsageError):
            daemon_options({}, {flag.variable: words[-1]})


def endpoints(raw: bytes) -> None:
    """``--etcd-endpoints`` and ``--kube-api-url``."""
    with refused_by(ConfigError):
        parse_endpoints(text_of(raw))
    with refused_by(ConfigError):
        server = kube_config.Server.parse(text_of(raw), "--kube-api-url")
        # what is taken can be asked for
        h11.Request(method="GET", target=f"{server.path}/x", headers=[("Host", server.authority)])
    with refused_by(ConfigError):
        Annotations.of_prefix(text_of(raw))


def files(raw: bytes) -> None:
    """Files of ours that others may have changed, and systemd's variables."""
    subnet_env.parse(raw)
    cni_conf.is_rendered(raw)
    with refused_by(ConfigError):
        read_env(_file(raw))
    state_file.peek(_file(raw), SUBNETS)
    text = text_of(raw).replace("\0", "")
    systemd._socket_address(text)
    systemd._watchdog_s({"WATCHDOG_USEC": text, "WATCHDOG_PID": text[:3]})


# ---- the kernel and its tools -----------------------------------------------------------------------------


def netlink(raw: bytes) -> None:
    """A datagram of the kernel. What is cut short is left out, and nothing else goes wrong (contract of messages)."""
    for kind, message_flags, _seq, _pid, body in nlmsg.messages(raw):
        if kind in (nlmsg.RTM_NEWLINK, nlmsg.RTM_DELLINK):
            link_codec.decode_link(body), link_codec.has_l2miss(body), link_codec.is_running(body)
        elif kind in (nlmsg.RTM_NEWADDR, nlmsg.RTM_DELADDR):
            link_codec.parse_address(body)
        elif kind in (nlmsg.RTM_NEWROUTE, nlmsg.RTM_DELROUTE):
            route_codec.decode_route(body, LINKS), route_codec.nexthop_of(body), route_codec.direct_device(body)
        elif kind in (nlmsg.RTM_NEWNEIGH, nlmsg.RTM_DELNEIGH, nlmsg.RTM_GETNEIGH):
            neigh_codec.decode_neigh(body, LINKS), neigh_codec.decode_neigh(body, LINKS, any_state=True)
            neigh_codec.decode_unresolved(body, LINKS), neigh_codec.decode_miss(body)
        elif kind == 2:
            nlmsg.parse_error(body, message_flags)
        elif kind == 3:
            nlmsg.parse_done(body, message_flags)
    for kind, message in _messages(raw):
        _table_and_chain(kind, message)
        list(_attributes(message))


def nft_listing(raw: bytes) -> None:
    """What ``nft -j`` prints."""
    with refused_by(KernelError):
        listing = {"nftables": nft._parse(raw.decode(errors="replace"))}
        traffic_nft.parse_table(listing)
        traffic_nft.rules_in(listing)
        traffic_nft.blocks_in(listing)


def iptables_saved(raw: bytes) -> None:
    """What ``iptables-save`` prints. Nothing of it comes back to ``iptables-restore`` but what we would write."""
    saved = raw.decode(errors="replace")
    repair = traffic_iptables.repair(saved, Family.V4, RULES)
    traffic_iptables.repair(saved, Family.V4, None)
    traffic_iptables.remnants(saved, [RULES.network])
    traffic_iptables.count_rules(saved)
    clean = traffic_iptables.repair("", Family.V4, RULES).payload.splitlines()
    known = {line for line in clean if line.startswith(("-A", "*", ":", "COMMIT"))}
    for line in repair.payload.splitlines():
        assert line in known or line.startswith(("-D ", "-F FLANNEL-", "-X FLANNEL-")), line


def xtables_blob(raw: bytes) -> None:
    """A table of iptables-legacy, as the kernel hands it out; misread ones are told by these errors."""
    import struct

    blob = xtables._Blob(xtables._LAYOUTS[Family.V4], (0,) * 5 + (len(raw),) * 5, bytearray(raw))
    with contextlib.suppress(struct.error, IndexError):
        blob.fingerprint(4, b"FLANNEL-POSTRTG")


def packet(raw: bytes) -> None:
    """A packet in the slow path of the udp backend: out of the TUN or out of a datagram."""
    buffer = bytearray(raw.ljust(20, b"\0"))
    if fault(buffer, 0, len(raw)):
        return
    assert len(destination(buffer, 0)) == 4
    complete_checksum(buffer, 0)
    take_hop(buffer, 0)
    answer = net_unreachable(bytes(buffer), IP(b"\x0a\x05\x01\x00"))
    assert answer is None or len(answer) <= 20 + 8 + 68
    assert len(buffer) == max(len(raw), 20)


def page_request(raw: bytes) -> None:
    """A request to the health server or the control socket."""

    async def serve() -> None:
        reader, writer = _stream(raw)
        with contextlib.suppress(OSError, EOFError):
            await PageServer(lambda _path: Page(200, "ok\n"))._converse(reader, writer)

    _run(serve())


# ---- all --------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A function of bytes, and inputs to begin with."""

    call: Callable[[bytes], None]
    seeds: Sequence[bytes]


_VALUE = (
    b'{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}'
)
_MEMORY = b"".join(
    remembered.encode(
        remembered.Header(
            network="/x", identity="a", boot="b", saved=1.0, store="7", config="{}", own="k", expires=None, leases=0
        ),
        {"k": Lease(SUBNET, None, decode_attrs(_VALUE))},
    )
).partition(b"sha256:")[0]
_NODE = (
    b'{"metadata":{"name":"n","resourceVersion":"7","creationTimestamp":"2026-11-21T10:12:35Z","annotations":'
    b'{"flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.0.2.2",'
    b'"flannel.alpha.coreos.com/backend-data":"{\\"VNI\\":1}","flannel.alpha.coreos.com/public-ip-overwrite":"x"}},'
    b'"spec":{"podCIDR":"10.5.2.0/24","podCIDRs":["10.5.2.0/24","fd00::/64"]},"status":{"conditions":[]}}'
)
_CONFIG = b"""apiVersion: v1
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: "https://192.0.2.1:6443", certificate-authority-data: QQ==}}]
users: [{name: u, user: {token: secret, client-key-data: QQ==, client-certificate: x.pem}}]
"""
_SAVED = traffic_iptables.repair("", Family.V4, RULES).payload.encode()
_LISTING = json.dumps(
    {
        "nftables": [
            {"metainfo": {}},
            {"table": {"family": "ip", "name": "flannel-ipv4", "handle": 1}},
            {"chain": {"name": "forward", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}},
            {
                "rule": {
                    "family": "ip",
                    "chain": "forward",
                    "expr": [
                        {
                            "match": {
                                "op": "==",
                                "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                                "right": {"prefix": {"addr": "10.5.0.0", "len": 16}},
                            }
                        },
                        {"accept": None},
                    ],
                }
            },
        ]
    }
).encode()
_IPV4 = bytes.fromhex("450000200001000040110000c6120002c6120003") + b"\x00\x01\x00\x02\x00\x0c\x00\x00abcd"
_NEIGH = neigh_codec.dump_neighbours(2, bridge=False) + link_codec.dump_links() + route_codec.dump_routes(Family.V4)

TARGETS: dict[str, Target] = {
    "lease_key": Target(lease_key, [b"10.5.2.0-24", b"/coreos.com/network/subnets/10.5.2.0-24&fd00:5::-64"]),
    "lease_value": Target(lease_value, [_VALUE, b'{"publicip":"1.2.3.4","x":[{"y":"\\u0000"}]}']),
    "backend_data": Target(backend_data, [b'{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}', b'{"KernelRx":true}']),
    "memory": Target(memory, [_MEMORY, b'{"kind":"flanneld-cache","version":1}\n[]\n']),
    "node": Target(node, [_NODE, b'{"type":"ADDED","object":%s}' % _NODE, b'{"metadata":{},"items":[%s]}' % _NODE]),
    "watch": Target(watch, [b"\x07" + b'{"type":"ADDED","object":%s}\n' % _NODE]),
    "http_answer": Target(
        http_answer,
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 3\r\n\r\n{}",
            b"HTTP/1.1 429 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        ],
    ),
    "kubeconfig": Target(kubeconfig, [_CONFIG]),
    "etcd_answer": Target(
        etcd_answer,
        [
            pb.RangeResponse(kvs=[pb.KeyValue(key=b"/s/10.5.2.0-24", value=_VALUE)], more=True).SerializeToString(),
            pb.WatchResponse(
                events=[pb.Event(kv=pb.KeyValue(key=b"/s/10.5.2.0-24", value=_VALUE, mod_revision=7))]
            ).SerializeToString(),
        ],
    ),
    "audit_answer": Target(audit_answer, [b"restored link flannel.1: its alias was 'x'", b"\xe2\x80\xa8\xc2\x85"]),
    "netconf": Target(
        netconf,
        [
            b'{"Network":"10.5.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan","VNI":1,"DirectRouting":true}}',
            b'{"EnableIPv6":true,"IPv6Network":"fd00:5::/48","EnableIPv4":false,"Backend":{"Type":"udp","Port":8285}}',
        ],
    ),
    "flags": Target(flags, [b"--iface=eth0\0--etcd-prefix\0/x\0-v=1", b"--public-ip=192.0.2.1\0--vmodule=a=1"]),
    "endpoints": Target(endpoints, [b"http://127.0.0.1:2379,https://[fd00::1]:2379", b"flannel.example.com/second"]),
    "files": Target(files, [b"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\n", b'{"kind":"x","version":1}']),
    "netlink": Target(netlink, [_NEIGH]),
    "nft_listing": Target(nft_listing, [_LISTING]),
    "iptables_saved": Target(iptables_saved, [_SAVED, _SAVED.replace(b"-A", b"[0:0] -A")]),
    "xtables_blob": Target(xtables_blob, [bytes(88) + b"\x70\x00\x98\x00" + bytes(60)]),
    "packet": Target(packet, [_IPV4]),
    "page_request": Target(page_request, [b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"]),
}

CORPUS = Path(__file__).with_name("corpus")
"""By target, inputs that once went wrong."""

_scratch = tempfile.TemporaryDirectory(prefix="flanneld-fuzz-")
_runner = asyncio.Runner()


def _file(raw: bytes) -> Path:
    path = Path(_scratch.name, "file")
    path.write_bytes(raw)
    return path


def _run(work: object) -> None:
    _runner.run(work)  # type: ignore[arg-type]
