"""Running a firewall tool: what the operator reads when it fails, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
from pathlib import Path

import pytest

from flanneld.errors import KernelError
from flanneld.kernel.run import run
from tests.support.wait import until


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


async def test_input_goes_in_and_output_comes_out(tools: Path) -> None:
    tool(tools, "fw", 'echo "$1"; cat')
    assert await run("fw", "-x", stdin="rules\n") == "-x\nrules\n"


async def test_a_tool_is_told_no_password_and_cannot_speak_to_systemd_for_us(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our variables are for us; what the operator's tools need of theirs they get."""
    monkeypatch.setenv("FLANNELD_ETCD_PASSWORD", "s3cret")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("XTABLES_LOCKFILE", "/run/other.lock")
    tool(tools, "fw", "env")
    told = await run("fw")
    assert "s3cret" not in told
    assert "NOTIFY_SOCKET" not in told
    assert "XTABLES_LOCKFILE=/run/other.lock\n" in told


async def test_a_tool_that_reads_no_input_is_no_error(tools: Path) -> None:
    tool(tools, "fw", "exec true")
    assert await run("fw", stdin="rule\n" * 100_000) == ""


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        ("Error: No such file\nlist table\n     ^", "run fw -a: failed (Error: No such file)"),
        (
            "fw-restore v1.8.9 (nf_tables): \nline 3: CHAIN_ADD failed",
            "(fw-restore v1.8.9 (nf_tables): line 3: CHAIN_ADD failed)",
        ),
        ("# Warning: iptables-legacy tables present\nBad rule", "run fw -a: failed (Bad rule)"),
        ("", "run fw -a: failed (status 4)"),
    ],
)
async def test_failure_tells_the_tools_own_first_sentence(tools: Path, stderr: str, sentence: str) -> None:
    (tools / "err").write_text(stderr)
    tool(tools, "fw", f"cat {tools}/err >&2; exit 4")
    with pytest.raises(KernelError) as caught:
        await run("fw", "-a")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("nft", "nftables"), ("iptables-save", "iptables")])
async def test_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("flanneld.kernel.run.SBIN", "")
    with pytest.raises(KernelError, match=f"apt-get install {package}"):
        await run(name)


async def test_a_tool_that_hangs_is_killed_with_its_children_at_the_deadline(tools: Path) -> None:
    """A wrapper script's child would hold the xtables lock for ever."""
    tool(tools, "fw", f"sleep 60 & echo $! >{tools}/child; wait")
    with pytest.raises(KernelError, match=r"killed after 0\.5 s"):
        await run("fw", timeout_s=0.5)
    await until(lambda: _is_gone(int((tools / "child").read_text())), what="the child's end")


async def test_a_cancelled_call_leaves_no_process(tools: Path) -> None:
    tool(tools, "fw", f"echo $$ >{tools}/pid; exec sleep 60")
    task = asyncio.create_task(run("fw"))
    await until(lambda: (tools / "pid").exists() and (tools / "pid").read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _is_gone(int((tools / "pid").read_text()))


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_host_without_room_for_another_process_is_one_sentence_and_no_end(tools: Path) -> None:
    """A limit of tasks or descriptors: who has rules to repair tries again."""
    tool(tools, "fw", "exec true")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, hard))
    try:
        with pytest.raises(KernelError, match="run fw: Too many open files"):
            await run("fw")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await run("fw") == ""
