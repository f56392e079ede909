"""A fake kube-apiserver: the parts of the API that a node daemon uses, and all that can go wrong with them.

It serves Nodes and Pods over HTTP/1.1 with TLS, tokens and RBAC, and lists, watches and patches as the real
server does. Its answers are compared with recordings of kube-apiserver 1.36.2 (``tests/kube``) and it is used
by the real ``kubectl``. In a test it runs in the test's own event loop::

    async with KubeApi() as api:
        api.create_node("n1", ["10.244.1.0/24"])
        ...                                          # the client under test talks to api.url
        api.faults.refuse(TOO_MANY_REQUESTS, times=2)
        api.end_watches("half_line")
        await api.restart()

and for the lab it runs as a process, ``python -m flanneld.lab.kubeapi``. Not served: protobuf, tables,
OpenAPI, admission webhooks, ownership of fields, collections but Nodes and Pods.
"""

from flanneld.lab.kubeapi.access import ADMIN_TOKEN, FLANNEL_TOKEN, FLANNEL_USER, NOBODY_TOKEN, Access
from flanneld.lab.kubeapi.faults import INTERNAL_ERROR, STORE_TIMEOUT, TOO_MANY_REQUESTS, UNAVAILABLE, Faults
from flanneld.lab.kubeapi.server import KubeApi, Seen
from flanneld.lab.kubeapi.tls import Authority, Certificates
from flanneld.lab.kubeapi.watches import Timing

__all__ = [
    "ADMIN_TOKEN",
    "FLANNEL_TOKEN",
    "FLANNEL_USER",
    "INTERNAL_ERROR",
    "NOBODY_TOKEN",
    "STORE_TIMEOUT",
    "TOO_MANY_REQUESTS",
    "UNAVAILABLE",
    "Access",
    "Authority",
    "Certificates",
    "Faults",
    "KubeApi",
    "Seen",
    "Timing",
]
