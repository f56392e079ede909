"""The lab: a real cluster on one machine, for operators to try things on and for our own tests.

Every host is a network namespace with its own links, routes, firewall and daemon; the packets and the
etcd are real. With two segments (the default is one) the hosts take turns: h1, h3, … on the first::

      outside  203.0.113.10            no route to the pod network: only masqueraded traffic is answered
         │
      router   203.0.113.1, 198.18.0.1, 198.18.1.1
         │                       │
      ═══╪═ segment 0 ═══╤═══════╪═══════════ bridges br0, br1 in namespace "switch"
         │ 198.18.0.0/24 │       └═══ segment 1 ═══╤═
       etcd              │         198.18.1.0/24   │
       .2 (.3 .4)       h1 .11                    h2 .12      eth0; flanneld in each
                         │ cni0 = its subnet + 1   │
                        pod1 = its subnet + 2     pod2

IPv6 is laid out likewise in 2001:db8:18::/48. Namespaces are called ``fl-NAME-h1``, ``fl-NAME-pod1``,
``fl-NAME-switch``, ``fl-NAME-router`` and ``fl-NAME-outside``; files stand in ``/run/flannel-lab/NAME``.
Nothing outside these is touched, so removing them removes everything, after a crash too.

Instead of etcd a Kubernetes API server of our own (``kubeapi``) may run at .2, with a Node for each host.
"""

from flanneld.lab.lab import Lab
from flanneld.lab.spec import LabSpec

__all__ = ["Lab", "LabSpec"]
