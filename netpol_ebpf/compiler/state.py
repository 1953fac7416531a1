# SPDX-License-Identifier: Apache-2.0
"""The compiler's state between commits.

Invariants: a commit changes the state only through the commit's journal.  Between commits the state agrees with the
tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol_ebpf.compiler.addresses import Addresses, Claim
from netpol_ebpf.compiler.classes import ClassTables
from netpol_ebpf.compiler.domains import DomainIndex, NameClass
from netpol_ebpf.compiler.identities import IdentityIndex
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.l4 import ANY_L4, ANY_SOURCE, SOURCE_BLOCK, AtomSpace
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.nodes import NodeNumbers
from netpol_ebpf.compiler.numbers import NumberPool, Ranges
from netpol_ebpf.compiler.owners import OwnerIndex
from netpol_ebpf.compiler.registers import RowRegister
from netpol_ebpf.compiler.rule_lists import RuleList
from netpol_ebpf.compiler.sets import LiveSet, Stores
from netpol_ebpf.compiler.setstore import SetStore
from netpol_ebpf.compiler.subjects import Subjects
from netpol_ebpf.compiler.tables import ATOM_BLOCKS, EndpointRow
from netpol_ebpf.compiler.templates import Templates
from netpol_ebpf.policy.types import Cause, Direction, Endpoint, EndpointKey, EndpointKind, PolicyKey, Stage, World

Slot = tuple[Direction, Stage]


@dataclass(frozen=True, slots=True)
class KnownNumbers:
    """Numbers from an earlier run that rows in the kernel still have.

    ``identities``: by digest of the identity's content.
    ``rules``: by cause.
    ``endpoints``: by key.
    ``name_classes``: by content.

    A number that several objects have, or that is out of range, is not kept.
    """

    identities: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[Cause, int] = field(default_factory=dict)
    endpoints: Mapping[EndpointKey, int] = field(default_factory=dict)
    name_classes: Mapping[NameClass, int] = field(default_factory=dict)


@dataclass(slots=True)
class LocalEndpoint:
    """A local endpoint with its policy in force.

    ``row``: the endpoint's row as it was last written; None before the first write.
    """

    endpoint: Endpoint
    number: int
    rule_lists: dict[Slot, RuleList] = field(default_factory=dict)
    sets: dict[Slot, LiveSet] = field(default_factory=dict)
    row: EndpointRow | None = None

    @property
    def claim(self) -> Claim:
        """The endpoint's claim to its addresses.

        If several local endpoints have an address, the smallest claim gets it: workloads come before hosts, then the
        key decides.
        """
        return (int(self.endpoint.kind is EndpointKind.HOST), self.endpoint.key, self.number)


class CompilerState:
    """Everything that the compiler keeps between commits."""

    def __init__(self, limits: Limits, known: KnownNumbers) -> None:
        self.limits = limits
        self.world = World()
        self.owners = OwnerIndex()
        self.identities = IdentityIndex(self.owners, known.identities)
        self.addresses = Addresses(self.identities)
        self.subjects = Subjects()
        self.templates = Templates(self.world, self.owners, self.identities, limits)
        self.stores = Stores(
            identities=self.identities,
            atoms=AtomSpace(ANY_L4, 0, ATOM_BLOCKS, limits),
            sources=AtomSpace(ANY_SOURCE, SOURCE_BLOCK, 256, limits),
            causes=RowRegister("rules", limits.rules, known.rules),
            log_lists=RowRegister("log_lists", limits.log_lists),
            names=DomainIndex(limits, known.name_classes),
            class_tables=ClassTables(self.identities, limits),
            verdicts=Ranges(limits.verdicts),
            columns=Ranges(limits.column_blocks),
            limits=limits,
        )
        self.sets = SetStore(self.stores)
        self.numbers = NumberPool(1, limits.endpoints)
        self.kept_numbers = self.numbers.keep(known.endpoints)  # of endpoints that do not exist yet in this run
        self.local: dict[EndpointKey, LocalEndpoint] = {}
        self.endpoint_owners: dict[EndpointKey, int] = {}
        self.set_owners: dict[str, int] = {}
        self.node_owners: dict[str, int] = {}
        self.nodes = NodeNumbers()
        self.by_tier: dict[str, set[PolicyKey]] = {}
        self.replaced: dict[PolicyKey, int] = {}  # key of a policy -> how many staged policies replace the policy
        self.with_profile: dict[str, set[EndpointKey]] = {}  # profile name -> local endpoints with the profile

    def release_kept(self) -> None:
        """Free the numbers of an earlier run that no object uses."""
        journal = Journal()
        self.stores.causes.release_kept(journal)
        for key in list(self.kept_numbers):
            self.numbers.give_back(journal.pop(self.kept_numbers, key), journal)

    def begin(self, journal: Journal) -> None:
        """Prepare the state for a commit, so that ``journal`` can roll the commit back."""
        self.stores.verdicts.begin(journal)
        self.stores.columns.begin(journal)

    def end_commit(self) -> None:
        """Clear what was recorded for one commit. Must be called after every commit, also after a failed commit."""
        self.identities.end_commit()
        self.owners.changed_names.clear()
        self.addresses.forget_dirt()
        self.sets.end_commit()
