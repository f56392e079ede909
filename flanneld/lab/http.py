"""One HTTP GET from inside a namespace; the lab asks etcd and the daemons' health endpoints with it."""

from __future__ import annotations

import http.client

from flanneld.lab.netns import run_in


def get(netns: str, address: str, port: int, path: str, timeout_s: float = 1.0) -> tuple[int, str]:
    """Fetch a page.

    Returns:
        Status and body; status 0 with the reason when nobody answers.
    """

    def fetch() -> tuple[int, str]:
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()

    return run_in(netns, fetch)
