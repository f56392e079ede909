"""Every scenario runs twice: on the fake kernel, and in a namespace of its own on the real one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from flanneld.contracts import Kernel
from flanneld.kernel.rtnl import Rtnl
from tests.support.fake_kernel import FakeKernel
from tests.support.netns import Netns, join

Scenario = Callable[[Kernel, int], Coroutine[Any, Any, None]]


class Stage:
    """Where a scenario is played."""

    def __init__(self, ns: Netns | None) -> None:
        self.ns = ns

    def play(self, scenario: Scenario) -> None:
        """Run a scenario, an async function of (kernel, index of eth0), to its end."""
        if self.ns is None:
            import asyncio

            asyncio.run(scenario(FakeKernel({"eth0": True}), 2))
            return

        async def on_the_real_one() -> None:
            kernel = Rtnl()
            try:
                await scenario(kernel, socket.if_nametoindex("eth0"))
            finally:
                kernel.close()

        self.ns.exec_async(on_the_real_one)

    def sh(self, command: str) -> str:
        """Do something to the kernel as an operator would; real stage only."""
        if self.ns is None:
            raise AssertionError("the fake kernel has no shell")
        return self.ns.run("sh", "-c", command)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kernel)])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    if request.param == "fake":
        yield Stage(None)
        return
    with Netns("fl-sc") as ns, Netns("fl-sc-peer") as other:
        join(ns, "eth0", other, "eth0")
        ns.run("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        yield Stage(ns)


@pytest.fixture
def real_stage() -> Iterator[Stage]:
    with Netns("fl-sc") as ns, Netns("fl-sc-peer") as other:
        join(ns, "eth0", other, "eth0")
        ns.run("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        yield Stage(ns)
