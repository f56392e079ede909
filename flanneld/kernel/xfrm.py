"""IPsec policies of the kernel: only whether there are any.

Source: include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

import errno
import socket
import struct

from flanneld.errors import KernelError
from flanneld.kernel import nlmsg

NETLINK_XFRM = 6
XFRM_MSG_NEWSPDINFO, XFRM_MSG_GETSPDINFO = 36, 37
XFRMA_SPD_INFO = 1
ANSWER_BYTES = 1 << 13


def has_policies() -> bool:
    """Whether IPsec policies apply to what this host sends or receives.

    Raises:
        KernelError: the kernel does not answer.
    """
    request = nlmsg.message(XFRM_MSG_GETSPDINFO, 0, struct.pack("=I", 0))
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_XFRM) as sock:
            sock.settimeout(5)
            sock.send(request)
            answer = sock.recv(ANSWER_BYTES)
    except OSError as exc:
        if exc.errno == errno.EPROTONOSUPPORT:
            return False  # a kernel without IPsec
        raise KernelError("count IPsec policies", exc.errno or 0) from exc
    for kind, _flags, _seq, _pid, body in nlmsg.messages(answer):
        counts = nlmsg.attrs(body, 4).get(XFRMA_SPD_INFO, b"") if kind == XFRM_MSG_NEWSPDINFO else b""
        if len(counts) >= 8:
            incoming, outgoing = struct.unpack_from("=II", counts)
            return bool(incoming or outgoing)
    raise KernelError("count IPsec policies", errno.EPROTO)
