"""Which subnets a network configuration allows, and which free one to take.

Pure: randomness comes in as an argument. Costs what the leases cost, never what the range costs, so
10.0.0.0/8 and an IPv6 /48 are as cheap as a /24 (contract 11.39).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from flanneld.errors import ConfigError, Unavailable
from flanneld.model.addr import Family, Prefix
from flanneld.model.netconf import FamilyConf, NetConf

Below = Callable[[int], int]
"""A uniformly random integer from 0 up to, not including, the argument: ``random.randrange``."""


class Subnets(NamedTuple):
    """The subnets of one lease."""

    v4: Prefix | None
    v6: Prefix | None

    def family(self, family: Family) -> Prefix | None:
        """The subnet of one family."""
        return self.v4 if family is Family.V4 else self.v6

    def overlaps(self, other: Subnets) -> bool:
        """Whether the two claim a common address in either family; absent parts claim none (contract 11.9)."""
        return any(a and b and a.overlaps(b) for a, b in zip(self, other, strict=True))

    def __str__(self) -> str:
        return "+".join(str(p) for p in self if p)


def is_allowed(subnet: Prefix, conf: FamilyConf) -> bool:
    """Whether a subnet has the configured length and lies inside the leasable range (contract 3.20)."""
    return (
        subnet.family is conf.network.family
        and subnet.length == conf.subnet_len
        and conf.subnet_min <= subnet.first <= conf.subnet_max
    )


def is_compatible(subnets: Subnets, conf: NetConf) -> bool:
    """Whether a lease's subnets fit the configuration: one allowed subnet for each enabled family, no other."""
    return all(_fits(subnets.family(family), conf.family(family)) for family in Family)


def _fits(subnet: Prefix | None, conf: FamilyConf | None) -> bool:
    if subnet is None or conf is None:
        return subnet is None and conf is None
    return is_allowed(subnet, conf)


def pick_subnet(conf: FamilyConf, taken: Iterable[Prefix], below: Below) -> Prefix:
    """Choose uniformly among all free subnets of the whole leasable range.

    Not among the first hundred as Go flanneld does, where a boot storm collides (contract 3.22).

    Args:
        conf: the family's range.
        taken: blocks that must not be overlapped, of any family, length and order, duplicates allowed.
        below: the source of randomness.

    Raises:
        ConfigError: the range holds no subnet at all.
        Unavailable: all are taken; one may be freed.
    """
    family, step, count = conf.network.family, _step(conf), capacity(conf)
    if count == 0:
        raise ConfigError(
            f"{family.label} network {conf.network} has no subnet to lease: "
            "SubnetMin lies above SubnetMax; correct them in the network configuration"
        )
    blocks = tuple(taken)
    runs = list(_taken_runs(conf, blocks))
    free = count - sum(map(len, runs))
    if free == 0:
        raise Unavailable(
            f"all {count} {family.label} subnets of {conf.network} are taken "
            f"(length /{conf.subnet_len}{_larger(conf, blocks)}); "
            "release leases of hosts that are gone (`flannelctl leases gc`) or enlarge the network"
        )
    index = below(free)
    for run in runs:  # ascending: each run at or below the index pushes it up by its length
        if run.start > index:
            break
        index += len(run)
    return Prefix.of_int(conf.subnet_min + index * step, conf.subnet_len, family)


def capacity(conf: FamilyConf) -> int:
    """How many subnets a family's range has, free or not."""
    return (conf.subnet_max - conf.subnet_min) // _step(conf) + 1 if conf.subnet_min <= conf.subnet_max else 0


def vacancies(conf: FamilyConf, taken: Iterable[Prefix]) -> int:
    """How many subnets of a family's range are free.

    Args:
        conf: the family's range.
        taken: as for ``pick_subnet``.
    """
    return capacity(conf) - sum(map(len, _taken_runs(conf, taken)))


class Room(NamedTuple):
    """How many hosts more a network takes."""

    free: int
    total: int


def room(conf: NetConf, leases: Iterable[Subnets]) -> Room:
    """How many subnets are left, in the family that has fewer.

    Args:
        conf: the network configuration, of at least one family.
        leases: all there are, whatever their values.
    """
    claimed = [counts(lease, conf) for lease in leases]

    def part(family: Family) -> Room:
        wanted = conf.family(family)
        if wanted is None:
            return Room(0, 0)
        return Room(
            vacancies(wanted, (block for lease in claimed if (block := lease.family(family)))), capacity(wanted)
        )

    return min(map(part, conf.families()))


def _step(conf: FamilyConf) -> int:
    return 1 << (conf.network.family.bits - conf.subnet_len)


def _larger(conf: FamilyConf, blocks: Iterable[Prefix]) -> str:
    """For the sentence about a full network: leases from when it was split otherwise, which hold many at once."""
    odd = sorted(
        {block.masked() for block in blocks if block.length < conf.subnet_len and conf.network.overlaps(block)}
    )
    if not odd:
        return ""
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f", of which larger leases hold several: {', '.join(map(str, odd[:3]))}{more}"


def _taken_runs(conf: FamilyConf, taken: Iterable[Prefix]) -> Iterator[range]:
    """The numbers of the taken subnets as disjoint ascending ranges."""
    step, count = _step(conf), capacity(conf)
    end = conf.subnet_min + count * step
    spans = sorted(
        ((block.first - conf.subnet_min) // step, (block.last - conf.subnet_min) // step + 1)
        for block in taken
        if block.family is conf.network.family and block.last >= conf.subnet_min and block.first < end
    )
    done = 0
    for first, stop in spans:
        run = range(max(first, done), min(stop, count))
        if run:
            yield run
            done = run.stop


def counts(claimed: Subnets, conf: NetConf) -> Subnets:
    """What of a claim counts when somebody looks for free space, or for who overlaps him.

    What holds a family's whole network is nobody's lease there (``fold.meaning`` says the same to peers), or one such
    key would keep every newcomer out, and everybody whose key is gone for a moment.
    """

    def part(family: Family) -> Prefix | None:
        block, wanted = claimed.family(family), conf.family(family)
        return block if block and wanted and block.length > wanted.network.length else None

    return Subnets(part(Family.V4), part(Family.V6))


def allocate(conf: NetConf, taken: Iterable[Subnets], previous: Subnets, below: Below) -> Subnets:
    """Choose the subnets of a new lease: in each enabled family the previous one if it can be had, else any free one.

    The families are independent. A host whose network gains or loses IPv6 so keeps its IPv4 subnet,
    and its containers their addresses, where Go flanneld starts anew (contract 3.20).

    Raises:
        ConfigError: a family has no subnets at all.
        Unavailable: a family has no free one now.
    """
    others = [counts(lease, conf) for lease in taken]

    def choose(family: Family) -> Prefix | None:
        wanted = conf.family(family)
        if wanted is None:
            return None
        blocks = [block for lease in others if (block := lease.family(family))]
        before = previous.family(family)
        if before and is_allowed(before, wanted) and not any(before.overlaps(block) for block in blocks):
            return before.masked()
        return pick_subnet(wanted, blocks, below)

    return Subnets(choose(Family.V4), choose(Family.V6))
