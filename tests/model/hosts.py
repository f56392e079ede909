"""A few hosts and a store, with all that can go wrong between them, for the checker.

Every decision is made by the functions that the daemon runs (``flanneld/plan``); described again are only the
steps around them: read, decide, write by compare-and-swap, and what gets lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from flanneld.errors import Unavailable
from flanneld.model.lease import Claim, Lease, LeaseAttrs, OwnLease
from flanneld.model.lease_codec import render_key
from flanneld.model.netconf import NetConf
from flanneld.plan import claim as claiming
from flanneld.plan import guard
from flanneld.plan.allocate import Subnets, allocate
from flanneld.plan.claim import Create, Remove, Take
from flanneld.plan.guard import Act, Found, Loss, Stake
from tests.model.checker import Move, Violation
from tests.model.state import (
    ACT,
    CHECK,
    CLAIM,
    GO,
    GUARD,
    HOLD,
    LOST,
    NOBODY,
    OFF,
    Entry,
    Host,
    State,
    Step,
    canonical,
    crashed,
    entry_at,
    is_unsure,
    knows,
    put,
    reads,
    rebuilt,
    subnets,
    with_entry,
    without,
)


class Rules(NamedTuple):
    """The decisions; a test may put a broken one in."""

    next_step: Callable[..., Take | Remove | Create] = claiming.next_step
    is_displaced: Callable[..., bool] = claiming.is_displaced
    look: Callable[..., Act | Loss] = guard.look
    rival: Callable[..., str | None] = guard.rival
    beaten: Callable[..., str | None] = guard.beaten


class Cluster:
    """See above.

    Args:
        conf: which subnets there are.
        hosts: what each of them publishes.
        faults: names of what may happen, see ``_faults``.
        budget: how much of it in one history.
        rules: the decisions.
        go: what Go flanneld on another machine publishes.
        clone_of: by host, of whom it is a clone, memory included.
    """

    def __init__(
        self,
        conf: NetConf,
        hosts: Iterable[LeaseAttrs],
        faults: Iterable[str],
        budget: int,
        rules: Rules | None = None,
        go: LeaseAttrs | None = None,
        clone_of: Mapping[int, int] | None = None,
    ) -> None:
        self.conf, self.attrs, self.names, self.budget = conf, tuple(hosts), frozenset(faults), budget
        self.rules, self.go, self.clone_of = rules or Rules(), go, clone_of or {}
        self.is_fair = not self.names & {"delete", "wipe", "restore", "go", "clone"}
        """Whether nobody but our hosts and time touches the store."""

    # ---- what the checker asks ------------------------------------------------------------------

    def start(self) -> State:
        return State(tuple(Host() for _ in self.attrs), faults=self.budget)

    def is_quiet(self, state: State) -> bool:
        """All hosts run; each has a lease that is its own as it knows, is in quarantine, or waits for a free subnet."""
        for number, host in enumerate(state.hosts):
            entry = entry_at(state, host.own)
            holds = host.phase == HOLD and entry and entry.writer == number and knows(state, host)
            waits = host.phase in (LOST, CLAIM) and not host.serves
            if is_unsure(host) or not (holds or waits):
                return False
        return not state.zombies

    def check(self, state: State) -> None:
        holders = [h for h in state.hosts if h.phase in (HOLD, GUARD) and h.serves and not is_unsure(h)]
        for index, one in enumerate(holders):
            for other in holders[index + 1 :]:
                both_know = all(knows(state, host) for host in (one, other))
                if subnets(one.own).overlaps(subnets(other.own)) and (both_know or self.is_fair):
                    raise Violation(f"two hosts hold {one.own} and {other.own}")

    def moves(self, state: State) -> Iterator[Move[State]]:
        for number, host in enumerate(state.hosts):
            if host.phase == OFF:
                yield self._move(state, f"h{number} starts", self._boot(host), number)
            elif host.stalled:
                yield self._move(state, f"h{number} goes on", host._replace(stalled=False), number)
            else:
                for label, after in self._run(state, number, host):
                    self._judge(state, after, number, host)
                    yield Move(f"h{number} {label}", False, canonical(after))
        for index, (number, step) in enumerate(state.zombies):
            left = state._replace(zombies=state.zombies[:index] + state.zombies[index + 1 :])
            yield Move(f"the late write of h{number} arrives", False, canonical(self._write(left, number, step)[0]))
        if state.faults:
            for label, after in self._faults(state._replace(faults=state.faults - 1)):
                yield Move(label, True, canonical(after))

    def _judge(self, before: State, after: State, number: int, was: Host) -> None:
        """Rules about what one of our hosts did."""
        mine, host = self.attrs[number], after.hosts[number]
        now = {entry.key: entry for entry in after.keys}
        for entry in before.keys:
            if now.get(entry.key) == entry or entry.writer == number:
                continue
            if entry.attrs.identity not in ("", mine.identity):
                raise Violation(f"h{number} wrote over {entry.key}, which is h{entry.writer}'s")
            if entry.attrs.public_ip != mine.public_ip and was.before != entry.key:
                raise Violation(f"h{number} wrote over {entry.key} of another address")
        if not host.serves or was.phase not in (CLAIM, HOLD, LOST):
            return
        for entry in before.keys if was.phase == CLAIM else filter(None, [entry_at(before, was.own)]):
            theirs = entry.writer not in (number, NOBODY) and entry.attrs.identity != mine.identity
            if was.phase == CLAIM and entry.attrs.public_ip == mine.public_ip and not entry.attrs.identity:
                continue  # at a start it is this host's own, from before it was swapped to ours (contract 13.6)
            if theirs and subnets(entry.key).overlaps(subnets(host.serves)):
                raise Violation(f"h{number} saw {entry.key} in other hands and goes on using {host.serves}")

    # ---- a host at work -------------------------------------------------------------------------

    def _boot(self, host: Host) -> Host:
        lost = frozenset({host.before}) if host.marked else frozenset[str]()
        return Host(CLAIM, before=host.before, marked=host.marked, lost=lost)

    def _run(self, state: State, number: int, host: Host) -> Iterator[tuple[str, State]]:
        match host.phase:
            case "claim":
                yield from self._claim(state, number, reads(state, host))
            case "act" | "guard":
                if host.step:
                    yield "writes", self._written(state, number, host, host.step)
            case "check":
                yield "looks for an older rival", self._checked(state, number, reads(state, host))
            case "hold" | "lost":
                yield from self._look(state, number, reads(state, host))

    def _claim(self, state: State, number: int, host: Host) -> Iterator[tuple[str, State]]:
        """``Claimer._attempt``: list and decide; for every number that chance may bring."""
        leases = {e.key: Lease(*subnets(e.key), e.attrs, e.revision, 1 + e.grant) for e in state.keys}
        before = subnets(host.before) if host.before else (None, None)
        claim = Claim(self.attrs[number], before, in_use=host.in_use)
        choice, count = 0, 1
        while choice < count:
            asked: list[int] = []

            def below(limit: int, choice: int = choice, asked: list[int] = asked) -> int:
                asked.append(limit)
                rest = choice
                for earlier in asked[:-1]:
                    rest //= earlier
                return rest % limit

            try:
                step = self.rules.next_step(leases, [], self.conf, claim, host.lost, below)
            except Unavailable:
                after = host if not host.in_use else self._lose(host, host.before, Loss.TAKEN)
                yield "finds no free subnet", put(state, number, after)
                return
            count = 1
            for limit in asked:
                count *= limit
            choice += 1
            if self.rules.is_displaced(step, claim):
                yield "finds its subnet taken", put(state, number, self._lose(host, host.before, Loss.TAKEN))
                return
            match step:
                case Take(key, lease):
                    planned = Step(key, lease.revision, by_guard=False)
                case Create(wanted):
                    planned = Step(render_key(*wanted), 0, by_guard=False)
                case Remove(key):
                    raise Violation(f"h{number} removes {key}")
            yield f"decides on {planned.key}", put(state, number, host._replace(phase=ACT, step=planned))

    def _written(self, state: State, number: int, host: Host, step: Step) -> State:
        """``OwnKey.write`` and what follows."""
        host = host._replace(step=None)
        after, done = self._write(state, number, step)
        if not done:
            return put(after, number, host._replace(phase=HOLD if step.by_guard else CLAIM))
        host = host._replace(own=step.key, revision=after.revision, seen=after.revision, same=True, expired=False)
        host = host._replace(epoch=state.epoch)
        host = host._replace(lost=host.lost - {step.key})
        if all(subnets(step.key)) and (step.over == 0 or not step.by_guard):
            return put(after, number, host._replace(phase=CHECK))
        return put(after, number, self._holds(host))

    def _write(self, state: State, number: int, step: Step) -> tuple[State, bool]:
        there = entry_at(state, step.key)
        if (there.revision if there else 0) != step.over:
            return state, False
        revision = state.revision + 1
        created = there.created if there else revision
        grant = NOBODY if there and there.grant == NOBODY else number
        entry = Entry(step.key, self.attrs[number], revision, created, number, grant, current=True)
        return with_entry(state, entry)._replace(revision=revision), True

    def _checked(self, state: State, number: int, host: Host) -> State:
        """``Claimer._is_beaten``, ``Keeper._create_again``: of two that overlap the older one stays."""
        stakes = [Stake(e.key, subnets(e.key), e.created) for e in state.keys]
        if not self.rules.beaten(stakes, host.own, subnets(host.own), host.revision):
            return put(state, number, self._holds(host))
        entry = entry_at(state, host.own)
        if entry and entry.revision == host.revision:
            state = without(state, host.own)
        if host.unchecked:
            return put(state, number, self._lose(host, host.own, Loss.TAKEN))
        return put(state, number, host._replace(phase=CLAIM, own="", revision=0))

    def _holds(self, host: Host) -> Host:
        """The lease is ours: ``LeaseGuard._held``. Another one than containers use makes the daemon begin anew."""
        return host._replace(
            phase=HOLD,
            serves=host.own,
            before=host.own,
            marked=False,
            in_use=False,
            moving=False,
            unchecked=False,
        )

    def _lose(self, host: Host, key: str, loss: Loss) -> Host:
        """``Keeper._lost``, ``LeaseGuard._enter``, ``Remembering.keep``."""
        return host._replace(
            phase=LOST,
            own=key,
            step=None,
            serves="",
            marked=True,
            in_use=False,
            expired=False,
            unchecked=False,
            lost=host.lost | {key},
            moving=loss is Loss.TAKEN,
        )

    def _look(self, state: State, number: int, host: Host) -> Iterator[tuple[str, State]]:
        """``Keeper._try_settle``, renewing or not; from quarantine too."""
        if host.phase == LOST and host.moving:
            yield "seeks another subnet", put(state, number, host._replace(phase=CLAIM, own="", moving=False))
            return
        entry = entry_at(state, host.own)
        if host.phase == HOLD and knows(state, host) and not host.unchecked:
            return  # it would find what it knows
        found = Found(entry.attrs, entry.revision, entry.created) if entry else None
        mine = self.attrs[number]
        own = OwnLease(host.own, Lease(*subnets(host.own), mine, host.revision), None)
        act = self.rules.look(
            found,
            own,
            mine,
            granted=entry is None or entry.grant == NOBODY or (entry.grant == number and entry.current),
            due=False,
            restores=host.restores,
            same_store=host.same,
        )
        if found and host.unchecked and not isinstance(act, Loss):
            checking = host._replace(phase=CHECK, revision=found.revision, same=True, epoch=state.epoch)
            checking = checking._replace(expired=False)
            yield "finds its own late write", put(state, number, checking)
            return
        yield f"looks: {act.name.lower()}", self._act(state, number, host, act, entry)

    def _act(self, state: State, number: int, host: Host, act: Act | Loss, entry: Entry | None) -> State:
        match act:
            case Loss():
                return put(state, number, self._lose(host, host.own, act))
            case Act.CREATE:
                stakes = [Stake(e.key, subnets(e.key), e.created) for e in state.keys]
                if self.rules.rival(stakes, host.own, subnets(host.own)):
                    return put(state, number, self._lose(host, host.own, guard.overlapped(same_store=host.same)))
                step, both = Step(host.own, 0, by_guard=True), all(subnets(host.own))
                return put(state, number, host._replace(phase=GUARD, step=step, unchecked=both))
            case Act.LEAVE:
                return put(state, number, host)
            case Act.CONFIRM:
                known = host._replace(revision=entry.revision if entry else 0, same=True, epoch=state.epoch)
                return put(state, number, self._holds(known._replace(expired=False)))
            case _:
                restores = host.restores + (act is Act.RESTORE)
                over = entry.revision if entry else 0
                step = Step(host.own, over, by_guard=True)
                return put(state, number, host._replace(phase=GUARD, step=step, restores=restores))

    # ---- what goes wrong ------------------------------------------------------------------------

    def _faults(self, state: State) -> Iterator[tuple[str, State]]:
        for number, host in enumerate(state.hosts):
            yield from self._host_faults(state, number, host)
        names = self.names
        for entry in state.keys:
            if "delete" in names:
                yield f"the operator deletes {entry.key}", without(state, entry.key)
            if entry.writer == GO and "go" in names:
                yield f"Go's lease of {entry.key} expires", without(state, entry.key)
        if "go" in names and self.go:
            yield from self._go(state, self.go)
        if "wipe" in names:
            yield "the store is rebuilt empty", rebuilt(state, (), 1)
        if "restore" in names and state.backup is None:
            yield "the store is backed up", state._replace(backup=(state.keys, state.revision))
        if "restore" in names and state.backup is not None:
            yield "the store is restored", rebuilt(state, *state.backup)

    def _host_faults(self, state: State, number: int, host: Host) -> Iterator[tuple[str, State]]:
        names, who = self.names, f"h{number}"
        if host.phase == OFF:
            if "memory" in names and host.before and not host.marked:
                remembered = self._boot(host)._replace(serves=host.before, in_use=True)
                yield f"{who} starts without the store", put(state, number, remembered)
            if "clone" in names and number in self.clone_of:
                original = state.hosts[self.clone_of[number]]
                yield f"{who} is cloned", put(state, number, host._replace(before=original.before))
        else:
            if "crash" in names:
                yield f"{who} crashes", crashed(state, number, Host(before=host.before, marked=host.marked))
            if "forget" in names:
                yield f"{who} crashes and forgets", crashed(state, number, Host())
            if "stall" in names and not host.stalled:
                yield f"{who} stalls", put(state, number, host._replace(stalled=True))
            if host.step and not host.stalled and "answer" in names:
                unsure = host._replace(step=None, phase=HOLD if host.step.by_guard else CLAIM)
                done = self._write(state, number, host.step)[0]
                yield f"{who} writes, the answer is lost", put(done, number, unsure)
                if "late" in names:
                    late = state._replace(zombies=(*state.zombies, (number, host.step)))
                    yield f"{who} gives up a write that is under way", put(late, number, unsure)
            if host.phase == CHECK and not host.stalled and "answer" in names:
                # ``Claimer`` begins anew and finds it; ``Keeper`` looks again
                again = host._replace(phase=CLAIM, own="") if not host.unchecked else host._replace(phase=HOLD)
                yield f"{who} gets no answer", put(state, number, again)
        has_lease = any(entry.grant == number for entry in state.keys)
        if "expire" in names and has_lease and (host.stalled or host.phase == OFF):
            keys = tuple(entry for entry in state.keys if entry.grant != number)
            yield f"{who}'s lease expires", put(state, number, host._replace(expired=True))._replace(keys=keys)

    def _go(self, state: State, attrs: LeaseAttrs) -> Iterator[tuple[str, State]]:
        """Go flanneld starts: writes over the first lease with its address, else creates one (contract 3.20)."""
        revision = state.revision + 1
        for entry in state.keys:
            if entry.attrs.public_ip == attrs.public_ip:
                written = Entry(entry.key, attrs, revision, entry.created, GO, GO, current=True)
                yield f"Go flanneld writes over {entry.key}", with_entry(state, written)._replace(revision=revision)
                return
        for choice in range(2):
            try:
                taken = [subnets(entry.key) for entry in state.keys]
                free = allocate(self.conf, taken, Subnets(None, None), lambda n, c=choice: c % n)  # type: ignore[misc]
            except Unavailable:
                return
            made = Entry(render_key(*free), attrs, revision, revision, GO, GO, current=True)
            yield f"Go flanneld leases {made.key}", with_entry(state, made)._replace(revision=revision)

    def _move(self, state: State, label: str, host: Host, number: int) -> Move[State]:
        return Move(label, False, canonical(put(state, number, host)))
