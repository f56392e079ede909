"""The loop: whatever happens sets a reason; a cycle reads everything, plans, applies, reports.

A lost event, a deleted device, a crash and a first start are all the same case. Imports no I/O module:
the kernel and the data path come in as contracts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from flanneld.contracts import DataPath, Failure, Kernel
from flanneld.errors import KernelError
from flanneld.model.lease import LeaseTable
from flanneld.model.objects import KernelObject, subject
from flanneld.plan.diff import Op, Verb, plan
from flanneld.plan.drift import audit_lines
from flanneld.wake import Reasons, Wake

log = logging.getLogger("flanneld.reconcile")

SLOW_CHECK_S = 60.0
"""A full look without any reason: the net under everything that a notification might miss."""

RETRY_S = 1.0
"""After a failed operation or a failed read."""

AUDIT_LINES = 20
"""Repairs told one by one in a cycle; a flush of thousands is told as a number."""


class Reconciler:
    """Owns the writing side of the kernel; one task runs ``run``."""

    def __init__(
        self,
        kernel: Kernel,
        path: DataPath,
        table: LeaseTable,
        wake: Wake,
        report: Callable[[str | None], None],
    ) -> None:
        self._kernel, self._path, self._table, self._wake = kernel, path, table, wake
        self._report = report
        self._settled: set[KernelObject] = set()
        """What was right after the last cycle: if it has to be put again, somebody else changed it."""
        self._notes: dict[str, str] = {}
        self._recreate: frozenset[str] = frozenset()
        self._cycles = 0
        self._broken: dict[str, str] = {}

    async def run(self) -> None:
        """Turn reasons into cycles, for ever."""
        timeout: float | None = None
        while True:
            reasons = await self._wake.wait(SLOW_CHECK_S if timeout is None else timeout)
            timeout = RETRY_S if await self.cycle(reasons) else None

    async def cycle(self, reasons: Reasons) -> bool:
        """One round; tells whether something remains to be retried."""
        began = time.monotonic()
        try:
            observed = await self._kernel.read(self._path.own, self._path.desired.sysctls)
            direct = self._kernel.onlink(self._path.public_addresses(self._table))
        except KernelError as exc:
            log.warning("cannot read the kernel's tables, trying again: %s", exc)
            self._report(str(exc))
            return True
        if self._table.complete:
            self._tell_notes(self._path.settle(self._table, observed, direct, fill=self._cycles > 0))
        ops = plan(
            self._path.desired,
            observed,
            self._path.own,
            deletions=self._table.complete,
            answer_is_right=self._path.answer_is_right,
            recreate=self._recreate,
        )
        failures = await self._kernel.apply(ops)
        if self._table.complete and observed.unresolved:
            answers = self._path.answer((link, ip, None) for link, ip in observed.unresolved)
            failures += await self._kernel.apply(answers)
        self._tell(reasons, ops, failures, began)
        self._after(failures)
        return bool(failures)

    def _after(self, failures: Sequence[Failure]) -> None:
        first_full = self._table.complete and self._cycles == 0
        if self._table.complete:
            self._cycles += 1
        self._settled = set(self._path.desired).difference(f.op.obj for f in failures)
        # A device that cannot be changed in place is made anew, once, in the next cycle.
        self._recreate = frozenset(
            obj_name for f in failures if f.op.verb is Verb.PUT and (obj_name := _link_name(f.op.obj))
        )
        self._report(str(failures[0].error) if failures else None)
        if first_full:
            self._wake("page ahead")

    def _tell(self, reasons: Reasons, ops: list[Op], failures: Sequence[Failure], began: float) -> None:
        failed = {f.op for f in failures}
        repairs = [op for op in ops if op not in failed and self._is_repair(op)]
        lines = list(audit_lines(repairs))
        for line in lines[:AUDIT_LINES]:
            log.info("%s, after %.0f ms", line, (time.monotonic() - reasons.since) * 1000)
        if len(lines) > AUDIT_LINES:
            log.info("and %d more repairs", len(lines) - AUDIT_LINES)
        self._tell_failures(failures)
        if ops:
            log.info(
                "reconciled reason=%s leases=%d add=%d del=%d failed=%d took_ms=%.0f",
                ",".join(reasons.names) or "check",
                len(self._table),
                sum(op.verb is not Verb.DELETE for op in ops),
                sum(op.verb is Verb.DELETE for op in ops),
                len(failures),
                (time.monotonic() - began) * 1000,
            )

    def _is_repair(self, op: Op) -> bool:
        """Whether an operation undoes what somebody else did, and not what a lease asked for."""
        if op.verb is Verb.CREATE:
            return any(subject(obj) == subject(op.obj) for obj in self._settled)
        return (op.obj in self._settled) is (op.verb is Verb.PUT)

    def _tell_failures(self, failures: Sequence[Failure]) -> None:
        """One line when an operation begins to fail, one when it works again."""
        now = {str(f.op): str(f.error) for f in failures}
        for op, error in now.items():
            if op not in self._broken:
                log.error("cannot %s; trying again every %.0f s", error, RETRY_S)
        for op in self._broken.keys() - now.keys():
            log.info("%s works again or is not needed any more", op)
        self._broken = now

    def _tell_notes(self, notes: dict[str, str]) -> None:
        for key, note in notes.items():
            if self._notes.get(key) != note:
                log.warning("%s", note)
        self._notes = notes


def _link_name(obj: KernelObject) -> str:
    kind, name, *_ = subject(obj)
    return str(name) if kind == "link" else ""
