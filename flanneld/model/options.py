"""What the operator asked for on the command line and in ``FLANNELD_*``, parsed and checked.

The defaults stand here and nowhere else (contract 1.2). Reading them is ``flanneld/cli_flags.py``'s work.
Never log a whole object of these: name the one field that matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flanneld.model.addr import IP


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """How to reach etcd; shared by the daemon and ``flannelctl``."""

    etcd_endpoints: str = "http://127.0.0.1:4001,http://127.0.0.1:2379"
    """Comma-separated URLs as given; the etcd client splits and checks them."""
    etcd_prefix: str = "/coreos.com/network"
    etcd_keyfile: str = ""
    etcd_certfile: str = ""
    etcd_cafile: str = ""
    etcd_username: str = ""
    etcd_password: str = field(default="", repr=False)
    """Kept out of ``repr``, so that no log line or traceback can show it (contract 11.50)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(EtcdOptions):
    """Everything the daemon can be told when it starts."""

    iface: tuple[str, ...] = ()
    """Interface names or addresses, tried in order."""
    iface_regex: tuple[str, ...] = ()
    """Tried after all of ``iface``; each compiles."""
    iface_can_reach: IP | None = None
    """Tried last: the interface the kernel would use to reach this address."""
    public_ip: IP | None = None
    """IPv4 address to advertise instead of the interface's own."""
    public_ipv6: IP | None = None
    allow_overlap: bool = False
    """Start although the cluster network overlaps networks of this host."""
    subnet_file: str = "/run/flannel/subnet.env"
    state_dir: str = "/var/lib/flanneld"
    """Machine identity and the local cache of leases."""
    renew_margin_s: int = 3600
    """Renew the lease when less than this is left; 60 to 86340 (the flag counts in minutes)."""
    ip_masq: bool = False
    ip_masq_fully_random_disable: bool = False
    iptables_forward_rules: bool = True
    iptables_resync_s: int = 5
    """Period of the rule check and of the blackhole route's, at least 1."""
    ip_blackhole_route: bool = False
    healthz_ip: str = "0.0.0.0"
    """Text form of an address, checked."""
    cni_conf_dir: str = ""
    """Where to keep a CNI configuration list; empty = none is written."""
    cni_conf_name: str = "10-flannel.conflist"
    """Its file name; runtimes take the first of the directory in alphabetical order."""
    cni_network_name: str = "cbr0"
    """Name of the network in it, under which host-local counts addresses; another one for a second network."""
    cni_bridge: str = "cni0"
    """The bridge in it; another one for a second network."""
    cni_conf_form: str = "bridge"
    """``bridge``: plain plugins; ``flannel``: delegated to flannel's own plugin (contract 10.8)."""
    healthz_port: int = 0
    """0 = no health server."""
    kube_subnet_mgr: bool = False
    kube_api_url: str = ""
    kube_annotation_prefix: str = "flannel.alpha.coreos.com"
    kubeconfig_file: str = ""
    net_config_path: str = "/etc/kube-flannel/net-conf.json"
    set_node_network_unavailable: bool = True
    drop_privileges: bool = True
    """Give up what root may do and the daemon does not need."""
    log_format: str = "text"
    """``text`` or ``json``."""
    v: int = 0
    """Above 0 logs debugging lines."""
    vmodule: tuple[tuple[str, int], ...] = ()
    """Verbosity by module: (glob on the module's file name without ``.py``, level)."""
    log_backtrace_at: str = ":0"
    """klog's; only its "off" value is accepted."""

    @property
    def network_id(self) -> str:
        """What tells networks apart on one host: where its leases are kept."""
        return f"kubernetes {self.kube_annotation_prefix}" if self.kube_subnet_mgr else self.etcd_prefix
