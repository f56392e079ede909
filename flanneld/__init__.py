"""A flannel-compatible overlay network daemon: leases subnets, programs the Linux kernel."""

__version__ = "0.1.0"
