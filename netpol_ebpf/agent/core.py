# SPDX-License-Identifier: Apache-2.0
"""The agent, one step at a time: manifests and interfaces in, enforcement out.

Invariants: what is in force was compiled whole from one state of the manifests; a step that fails leaves the state before in
force and tells so in `Agent.problems`; an interface that is a workload's is never open without policy: until it is known
whose it is, the program on it denies everything.

Runs no loop and opens no files or sockets: `netpol_ebpf.agent.main` does, and tests do without.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.adoption import Adoption, NodeAddresses, Workload
from netpol_ebpf.agent.assignments import Evidence, InterfaceAssignments, LocatedEndpoints
from netpol_ebpf.agent.attachments import Attachments
from netpol_ebpf.agent.barrier import Barrier, BarrierSettings
from netpol_ebpf.agent.claims import AddressClaims
from netpol_ebpf.agent.cni import CniResult
from netpol_ebpf.agent.handover import Handover, Handovers
from netpol_ebpf.agent.in_force import WorldInForce
from netpol_ebpf.agent.node import NodeAccess
from netpol_ebpf.agent.other_programs import REDIRECT, problems_of
from netpol_ebpf.agent.own_interfaces import HostPolicyInputs, OwnInterfaces
from netpol_ebpf.agent.rejected import DriftLog, RejectedChanges
from netpol_ebpf.agent.wiring import NOWHERE, Wiring, device_flags
from netpol_ebpf.apply.applier import Applier, Binding, require_room
from netpol_ebpf.apply.audit import Audit
from netpol_ebpf.apply.encode import EndpointFlag
from netpol_ebpf.apply.events import FlowEvent, Names, decode_event
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.apply.surroundings import SurroundingsWriter
from netpol_ebpf.compiler import Change, CompiledTables, Compiler, KnownNumbers, Limits
from netpol_ebpf.errors import InvalidInputError, LimitError, Location, MapFullError, PlatformError, Problem
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import (
    TUNNELS,
    Action,
    Cause,
    Changes,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    IPAddress,
    LabelledNets,
    Policy,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    ResourceKey,
    ServiceBackends,
    Staged,
    Tunnel,
    World,
)
from netpol_ebpf.resources.types import Pod
from netpol_ebpf.sources.files import ManifestDirectory, SourceUpdate, Upsert
from netpol_loader import abi
from netpol_loader.pins.drift import Drift, PartlyMendedError

log = logging.getLogger(__name__)

HOST_ENDPOINT = "HostEndpoint"
"""Kind of endpoints that interfaces are not bound to."""
SEARCH_S = 0.5
"""How often to look for interfaces that nothing announces (an address inside a pod's namespace); arbitrary."""

MISSING_S = 5.0
"""How long a workload may be without an interface before that is a problem; arbitrary."""
SHOWN = 5
"""Names in a message; arbitrary."""

AUDIT_S = 1.0
"""How often to look whether programs, pins and the next rows are as they were left; arbitrary."""
ROUND_S = 5.0
"""Least time between the beginnings of two rounds through all rows; arbitrary."""


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What the agent is asked to do.

    ``node``: name of this node, None: every workload that is found here is local.  ``interfaces``: patterns of workload
    interfaces, () for the built-in rule (`assignments.may_be_workloads`); ``own_interfaces``: patterns of those that are the node's.
    ``borrow_sources``: honour a pod's allowed source prefixes.
    ``keep_revoked``: connections that policy no longer allows live on until they end.  ``workload_to_host``: what becomes of
    packets of workloads to their own node, PASS: a wildcard host endpoint's policy decides.  ``mark_shift``: lowest of 16
    bits of the packets' mark that are ours, 0: none.  ``tunnels``: encapsulation, as IP protocol and UDP port, that nodes take
    from anyone, besides that of this node's devices; between known nodes it passes host endpoints.  ``routers``: patterns of ``NAMESPACE/NAME`` of workloads that others
    route through.  ``hairpin``: what comes from outside may have the source of a workload of this node.  ``barrier``: what
    stands behind the programs.
    """

    node: str | None = None
    interfaces: Sequence[str] = ()
    own_interfaces: Sequence[str] = ()
    borrow_sources: bool = False
    keep_revoked: bool = False
    workload_to_host: Action = Action.ALLOW
    mark_shift: int = 0
    tunnels: frozenset[tuple[int, int]] = frozenset()
    routers: Sequence[str] = ()
    hairpin: bool = False
    barrier: BarrierSettings = BarrierSettings()

    def is_router(self, key: EndpointKey) -> bool:
        """Whether others route through a workload."""
        return any(fnmatchcase(f"{key.namespace}/{key.name}", pattern) for pattern in self.routers)


@dataclass(slots=True)
class NumberNames:
    """What numbers in events stand for, also for a while after they went: a name is replaced when its number is given away again."""

    rules: dict[int, Cause] = field(default_factory=dict)
    log_lists: dict[int, tuple[int, ...]] = field(default_factory=dict)
    endpoints: dict[int, EndpointKey] = field(default_factory=dict)

    def learn(self, change: Change) -> None:
        """Take note of the numbers that a change brings."""
        for _, batch in change.batches():
            if "rules" in batch:
                self.rules.update(batch["rules"].upserts)
            if "log_lists" in batch:
                self.log_lists.update(batch["log_lists"].upserts)
            if "endpoints" in batch:
                self.endpoints.update({row.number: key for key, row in batch["endpoints"].upserts.items()})


class Agent:
    """Keeps a node's enforcement in step with its manifests and interfaces. `start` once, then `step` again and again."""

    def __init__(
        self,
        settings: AgentSettings,
        node: NodeAccess,
        source: ManifestDirectory,
        ledger: Ledger,
        clock: Callable[[], float],
        assignments_file: Path | None = None,
        handovers_file: Path | None = None,
    ) -> None:
        """``assignments_file``: where what was decided about interfaces outlives the process; None: it does not.

        ``handovers_file``: the same for what the CNI plugin said of them.
        """
        self.settings = settings
        self._node = node
        self._source = source
        self._ledger = ledger
        self._clock = clock
        self._derivation = Derivation(PolicySettings(workload_to_host=settings.workload_to_host))
        self._claims = AddressClaims(self._derivation.world)
        self._handovers = Handovers(handovers_file)
        self._in_force = WorldInForce()
        self._local: dict[EndpointKey, Endpoint] = {}  # with the addresses that count as theirs
        self._names = NumberNames()
        self._compiler = Compiler()
        self._applier: Applier | None = None
        self._attachments = Attachments(node)
        self._own = OwnInterfaces(settings.node, self._attachments, settings.tunnels)
        self._audit: Audit | None = None
        self._wiring = Wiring()
        self._assignments = InterfaceAssignments(settings.interfaces, settings.own_interfaces)
        self._assignments_file = assignments_file
        self._assignments_damage: tuple[Problem, ...] = ()
        self._assignments_problems: tuple[Problem, ...] = ()
        self._located = LocatedEndpoints()
        self._told: frozenset[str] = frozenset()  # of what is not enforced
        self._missed_s: dict[EndpointKey, float] = {}  # since when there has been no interface of these
        self._adoption = Adoption()
        self._manifest_problems: tuple[Problem, ...] = ()
        self._no_room: dict[EndpointKey, Problem] = {}  # endpoints whose row did not fit
        self._unmended: Problem | None = None
        self._other_programs: list[Problem] = []
        self._is_behind = False  # the compiler dropped changes: hand it the whole world
        self._is_ahead = False  # the kernel refused what the compiler holds: start over with new maps
        self._looked_at_s = self._audited_s = self._round_s = clock()
        self._has_looked = False  # at the interfaces, in this step
        self._others: dict[IPAddress, str] | None = None
        self.refusals = RejectedChanges()
        self.drift = DriftLog()
        self.barrier = Barrier(settings.barrier, node.barrier, clock, node.others)
        self.changes_applied = 0
        self.last_change_s: float | None = None

    # --- problems and status -----------------------------------------------------------------------------------------

    @property
    def skipped(self) -> dict[str, int]:
        """How many objects of the manifests are of kinds that are not read, by apiVersion and kind."""
        return self._source.skipped

    @property
    def problems(self) -> list[Problem]:
        """Everything that keeps the node from being as the manifests say."""
        found = [*self._manifest_problems, *self._own.problems(self._derivation.world.endpoints, self._location)]
        found += [*self._disputes(), *self._no_room.values(), *self._attachments.problems]
        found += self._adoption.warnings.values()
        found += self.barrier.problems
        found += self._other_programs
        others = (self.refusals.problem, self._unmended, self._own.no_room)
        found += [one for one in others if one is not None]
        for key, message in sorted(self._located.problems.items()):
            found.append(Problem(self._location(key), "", f"interface: {message}", obj=str(key), slug="interface"))
        found += self._doubts()
        found += self._unenforced()
        return [
            *found,
            *self._wiring.problems,
            *self._assignments_damage,
            *self._assignments_problems,
            *self._handovers.problems,
        ]

    @property
    def names(self) -> Names:
        """What numbers in events stand for."""
        return Names(self._names.rules, self._names.log_lists, self._names.endpoints)

    @property
    def derivation(self) -> Derivation:
        """The objects of the manifests, translated; for reading."""
        return self._derivation

    @property
    def world_in_force(self) -> World:
        """The objects that the rows in force were made of, each address its holder's alone; for reading."""
        return self._in_force.world

    def interface_towards(self, address: IPAddress) -> int | None:
        """The interface by which the node would send to an address now, None where there is no way."""
        return self._node.interface_towards(address)

    @property
    def own(self) -> OwnInterfaces:
        """The node's own interfaces, and whose policy is in force there; for reading."""
        return self._own

    @property
    def tables(self) -> CompiledTables:
        """The compiled tables in force; for reading."""
        return self._compiler.tables

    @property
    def wiring(self) -> Wiring:
        """The interfaces as last seen."""
        return self._wiring

    def isolation(self, key: EndpointKey) -> dict[Direction, list[Policy]]:
        """By direction, the enforced policies that isolate a local workload; none: what no profile denies is allowed there."""
        policies = [one for one in self._compiler.policies_of(key) if one.staged is Staged.NO]
        return {way: [one for one in policies if way in one.types] for way in Direction}

    @property
    def evidence(self) -> Mapping[EndpointKey, Evidence]:
        """What says where each local workload is, of those that were found."""
        return self._located.evidence

    def is_own(self, ifindex: int) -> bool:
        """Whether an interface is the node's own."""
        return ifindex in self._own.interfaces

    @property
    def attached(self) -> frozenset[int]:
        """Interfaces with programs on them."""
        return frozenset(self._attachments.interfaces)

    @property
    def audited_rounds(self) -> int:
        """How often every row in force has been looked at."""
        return 0 if self._audit is None else self._audit.rounds

    @property
    def applier(self) -> Applier:
        """The writer of the maps in force."""
        if self._applier is None:
            raise AssertionError("the agent has not been started")
        return self._applier

    def owner_of(self, address: IPAddress) -> str | None:
        """The workload, or else the host endpoint or the node, that has an address; by name the first of several."""
        holder = self._claims.holder(address)
        if holder is not None:
            return str(holder)
        if self._others is None:
            world = self._derivation.world
            hosts = [(key, one) for key, one in world.endpoints.items() if one.kind is EndpointKind.HOST]
            named = [(node.addresses, f"Node/{name}") for name, node in sorted(world.nodes.items())]
            named += [(one.addresses, str(key)) for key, one in sorted(hosts, reverse=True)]
            self._others = {each: name for addresses, name in named for each in addresses}
        return self._others.get(address)

    def local_endpoints(self) -> list[Endpoint]:
        """The workloads that are, or would be, on this node, with the addresses that count as theirs."""
        return list(self._local.values())

    def is_local(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint is a workload of this node."""
        return endpoint.kind is EndpointKind.WORKLOAD and self.settings.node in (None, endpoint.node)

    def _is_ours(self, endpoint: Endpoint) -> bool:
        """Whether policy must be compiled for an endpoint: a workload of this node, or a host endpoint of it.

        Without a node's name, every host endpoint may be one: its addresses tell, when it is given its interfaces.
        """
        return self.settings.node in (None, endpoint.node)

    # --- desired state ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the manifests as they are now in force, in one exchange with what an earlier agent left.

        Raises LimitError or MapFullError when they do not fit, InvalidInputError when their directory cannot be read: that is
        not the same as an empty one. Then everything is as it was.
        """
        self._ledger.open()
        batch = self._source.step()
        if batch is not None:
            self._take(batch)
        if not self._source.was_read:
            reasons = "; ".join(f"{one.location} {one.message}" for one in self._source.problems)
            raise InvalidInputError(f"the manifests are not known: {reasons}")
        self._take_changes(older=set(self._ledger.numbers.endpoints))
        self._recall_assignments()
        self._look_at_interfaces()
        self._recall_handovers()
        self._take_changes()  # what the interfaces tell of tunnels is in the world already
        self._locate()  # of pods that have their addresses by the CNI plugin alone
        self._take_off_moved()
        self._attachments.find()  # by an earlier agent
        self._adoption.expect(self._wanted_interfaces() - self.attached)
        self._install()
        self._adoption.go_ahead(self._node, *self._adoptable())
        for ifindex in self._wanted_interfaces():
            self._attach(ifindex)
        self._attachments.find()
        self._close_and_open()

    def step(self) -> list[FlowEvent]:
        """Do whatever there is to do now; returns the flows that were reported since the last step."""
        self._has_looked = False
        self.close_newborn()
        batch = self._source.step(self.close_newborn)  # what is born meanwhile is looked at below
        if self._node.has_news() or self._is_searching():
            gone = self._gone()
            self._handovers.forget(gone)
            self._assignments.forget(gone)  # before another interface with such a number is taken for the same
            self._look_at_interfaces()
            self._let_go(gone)
            self._close_and_open()
        if batch is not None:
            self._take(batch)
        if batch is not None or self._derivation.is_changed or self._handovers.is_changed:
            self._bring_into_force(self._take_changes())
        elif self.refusals.retry_at_s is not None and self._clock() >= self.refusals.retry_at_s:
            self._bring_into_force(Changes())
        self.drift.note(self.barrier.follow(), self._clock())
        self._look_for_drift()
        return self.read_flows()

    def hand_over(self, handed: Handover) -> None:
        """Take up what the CNI plugin says of an interface; the next step acts on it, and `missing_for` says how far it is."""
        self._handovers.add(handed)

    @property
    def has_handovers(self) -> bool:
        """Whether a step is to act on what was handed over."""
        return self._handovers.is_changed

    def missing_for(self, handed: Handover) -> str:
        """Why policy for an interface that was handed over is not in force yet; empty: it is."""
        key = handed.pod
        endpoint = self._local.get(key)
        binding = self.applier.bindings.get(key)
        if not self._is_there(handed):
            return f"the node has no interface {handed.name} with its other end where it was said to be"
        if not handed.is_first:
            return f"{handed.inside} is a further interface, and policy knows a workload by its first"
        if self._handed(key) != handed:
            pod = self._derivation.get(key_of_endpoint(key))
            return "its Pod object has not arrived" + (", only another one's of its name" if pod is not None else "")
        if endpoint is None:
            return "its Pod object is that of a pod of another node, of the host's network, or of one that has ended"
        if self._derivation.get(ResourceKey("Namespace", "", key.namespace)) is None:
            return f"its Namespace {key.namespace} has not arrived"
        others = [
            f"{one} is {holder}'s"
            for one in handed.addresses
            if (holder := self._claims.holder(one)) not in (None, key)
        ]
        if others:
            return "; ".join(others)
        if self._in_force.world.endpoints.get(key) != endpoint or binding is None or binding.ifindex != handed.ifindex:
            reasons = [one.message for one in (self.refusals.problem, self._no_room.get(key)) if one is not None]
            reasons += [self._located.problems.get(key, "its policy is not in the kernel yet")]
            return reasons[0]
        return "" if handed.ifindex in self.attached else f"interface {handed.name} has no programs"

    def close_newborn(self) -> None:
        """Put programs on interfaces that have come just now, before anything else is found out about them. Takes no time.

        They deny everything until a step finds whose they are, or takes them off what is the node's own after all.
        """
        for link in self._node.take_born():
            is_known = link.ifindex in self._wiring.links or link.ifindex in self.attached
            if not is_known and self._assignments.close_newborn(link):
                self._attachments.attach(link.ifindex, link.name, is_newborn=True)

    def read_flows(self) -> list[FlowEvent]:
        """The flows that the program reported since the last call."""
        raw: list[abi.np_event] = []
        self._node.read_events(raw.append)
        return [decode_event(event, self.names) for event in raw]

    # --- manifests --------------------------------------------------------------------------------------------------

    def _take(self, batch: SourceUpdate) -> None:
        """Take up what changed. Nothing of the batch is kept: of a cluster it is large."""
        known = set(self._manifest_problems)
        for problem in batch.problems:
            if problem not in known:
                log.log(logging.ERROR if problem.severity == "error" else logging.WARNING, "%s", problem)
        self._manifest_problems = batch.problems
        for event in batch.events:
            if isinstance(event, Upsert):
                self._derivation.upsert(event.resource, event.key)
            else:
                self._derivation.remove(*event.key)

    def _take_changes(self, older: Collection[EndpointKey] = ()) -> Changes:
        """What the manifests changed, addresses going to those who had them first. ``older``: see `AddressClaims.apply_changes`."""
        changes = self._derivation.take_changes()
        before = set(self._claims.disputes())
        self._lend_addresses(changes)
        self._claims.apply_changes(changes, older, self._is_idle)
        for key, endpoint in changes.endpoints.items():
            if endpoint is not None and self.is_local(endpoint):
                self._local[key] = endpoint
            else:
                self._local.pop(key, None)
                self._missed_s.pop(key, None)
            if endpoint is None or endpoint.kind is EndpointKind.HOST:
                self._others = None
        if changes.nodes:
            self._others = None
        self._in_force.expect(changes)
        for dispute in self._claims.disputes():
            if dispute not in before:
                log.log(logging.ERROR if dispute[2] in self._local else logging.WARNING, "%s", _dispute(*dispute))
        return changes

    def _is_idle(self, key: EndpointKey) -> bool:
        """Whether a workload of this node has no interface, which is known when they have been looked at."""
        return bool(self._wiring.links) and key in self._local and key not in self._located.interfaces

    def _lend_addresses(self, changes: Changes) -> None:
        """Pods have the addresses that the CNI plugin handed over before their objects have; ``changes`` gets what that changes."""
        changed = self._handovers.take_changed()
        for key in {*changed, *self._handovers.pods, *self._claims.borrowers}:
            handed = self._handed(key)
            is_news = self._claims.lend(key, () if handed is None else handed.addresses)
            endpoint = self._derivation.world.endpoints.get(key)
            if endpoint is not None and (is_news or key in changed):
                changes.endpoints.setdefault(key, endpoint)

    def _recall_handovers(self) -> None:
        """What the CNI plugin said to an earlier agent, of interfaces that are still there."""
        self._handovers.recall()
        known = [one for pod in self._handovers.pods for one in self._handovers.of(pod)]
        self._handovers.forget([one.ifindex for one in known if not self._is_there(one)])

    def _handed(self, key: EndpointKey) -> Handover | None:
        """The first interface of the pod that the cluster has under this name now, as the CNI plugin handed it over."""
        pod = self._derivation.get(key_of_endpoint(key))
        first = (one for one in self._handovers.of(key) if one.is_first)
        return next((one for one in first if isinstance(pod, Pod) and one.is_of(pod.uid)), None)

    def _bring_into_force(self, changes: Changes) -> None:
        """Compile and apply; when it does not fit, say so and try again with the next change, or when memory may be back."""
        if not changes and not self._is_behind and not self._is_ahead:
            return
        self.refusals.expect(changes, self._location_of)
        before = self._own.inputs
        try:
            if self._is_ahead:
                self._locate()  # endpoints may have gone since
                self._install()
            else:
                self._compile(changes)
        except (LimitError, MapFullError) as error:
            self.refusals.refuse(error, self._clock())
            self._is_behind = self._is_behind or isinstance(error, LimitError)
            self._is_ahead = self._is_ahead or isinstance(error, MapFullError)
            if self._own.inputs is not before:  # what was to go has to come back
                self._own.inputs = before
                self._close_and_open()
            return
        self.refusals.accept()
        if self._is_waiting() and not self._has_looked:
            self._look_at_interfaces()  # an address inside a pod's namespace is not announced
        else:
            self._locate()
        self._close_and_open()

    def _compile(self, changes: Changes) -> None:
        if self._is_behind:
            self._compiler.replace(self._claims.effective_world())
        else:
            for kind, key, new in _objects(changes):
                if new is None:
                    self._compiler.remove(kind, key)
                else:
                    self._compiler.upsert(new)
        change = self._compiler.commit()
        self._is_behind = False
        after, own, workloads = (
            HostPolicyInputs.of(self._derivation.world, self.tables, self.settings.node),
            self._own,
            self._wanted_interfaces(),
        )
        own.require_room(after, self._wiring, workloads)
        self._record(change, self.applier)
        own.inputs = own.inputs.without_removed(after)
        own.place(self._wiring, workloads)
        self.applier.apply(change)
        own.inputs = after
        self._forget(change)
        self._note_change()

    def _install(self) -> None:
        """Compile everything into maps of its own, and let it take the place of whatever is in force."""
        numbers = self._ledger.numbers
        known = KnownNumbers(dict(numbers.identities), dict(numbers.rules), self._known_endpoints())
        sizes = self._node.renewal_sizes()
        compiler = Compiler(self._is_ours, limits=limits_of(sizes), known=known)
        compiler.replace(self._claims.effective_world())
        change = compiler.commit()
        inputs = HostPolicyInputs.of(self._derivation.world, compiler.tables, self.settings.node)
        own = self._own.initial_state(inputs, self._wiring, self._wanted_interfaces(), self._node.attached())
        bindings = {**self._bindings(), **own.bindings}
        # Before maps and programs are made in vain.
        require_room(compiler.tables, sizes, bindings, own.complete.elements())
        with self._node.renewal() as maps:
            applier = Applier(maps)
            for key, binding in bindings.items():
                applier.bind(key, binding)
            self._record(change, applier)
            applier.fill(compiler.tables)
            surroundings = SurroundingsWriter(maps, applier.bump_generation)
            surroundings.write(own.surroundings)
        self._compiler, self._applier = compiler, applier
        self._own.take_over(own, maps, applier, surroundings)
        self._audit = Audit(maps, compiler.tables, applier, surroundings)
        self._is_ahead = self._is_behind = False
        keep = abi.NP_CONFIG_KEEP_REVOKED
        applier.set_flags(**({"on": keep} if self.settings.keep_revoked else {"off": keep}))
        to_host = {Action.DENY: abi.NP_CONFIG_TO_HOST_DENY, Action.PASS: abi.NP_CONFIG_TO_HOST_PASS}
        applier.set_flags(off=abi.NP_CONFIG_TO_HOST_DENY | abi.NP_CONFIG_TO_HOST_PASS)
        applier.set_flags(on=to_host.get(self.settings.workload_to_host, 0))
        hairpin = abi.NP_CONFIG_HAIRPIN
        applier.set_flags(**({"on": hairpin} if self.settings.hairpin else {"off": hairpin}))
        applier.set_sender_tag_bits(self.settings.mark_shift)
        self.barrier.sign(applier)
        applier.bump_generation()  # the new policy may allow less than what an earlier agent left
        self._forget_unused()
        self._note_change()

    def _known_endpoints(self) -> dict[EndpointKey, int]:
        """Numbers of the ledger and, should that have been lost, of the rows that the interfaces of our endpoints have now."""
        known = dict(self._ledger.numbers.endpoints)
        taken, former = set(known.values()), self._former_numbers()
        for key, ifindex in self._located.interfaces.items():
            number = former.get(ifindex)
            if key not in known and number is not None and number not in taken:
                known[key] = number
                taken.add(number)
        return known

    def _former_numbers(self) -> dict[int, int]:
        """Numbers of the rows in force, by interface; one that several interfaces have tells nothing."""
        former = self._node.former_numbers()
        users = Counter(former.values())
        return {ifindex: number for ifindex, number in former.items() if users[number] == 1}

    def _record(self, change: Change, applier: Applier) -> None:
        """Numbers to the ledger, before the kernel sees them; what a number counted for something else is forgotten."""
        self._names.learn(change)
        for _, batch in change.batches():
            if "rules" in batch:
                rules = {cause: number for number, cause in batch["rules"].upserts.items()}
                known = self._ledger.numbers.rules
                applier.reset_counters(number for cause, number in rules.items() if known.get(cause) != number)
                self._ledger.record("rule", rules)
            if "identities" in batch:
                upserts = batch["identities"].upserts
                self._ledger.record("identity", {digest: number for number, digest in upserts.items()})
            if "endpoints" in batch:
                upserts = batch["endpoints"].upserts
                self._ledger.record("endpoint", {key: row.number for key, row in upserts.items()})

    def _forget(self, change: Change) -> None:
        """Numbers out of the ledger, after the kernel has forgotten them."""
        for _, batch in change.batches():
            for table, kind in (("rules", "rule"), ("identities", "identity")):
                if table in batch:
                    self._ledger.release(kind, batch[table].deletes)
            if "endpoints" in batch:
                self._ledger.forget("endpoint", batch["endpoints"].deletes)

    def _forget_unused(self) -> None:
        """Numbers of the ledger that the tables in force do not use are free again."""
        tables, numbers = self.tables, self._ledger.numbers
        self._ledger.forget("rule", set(numbers.rules) - {cause for _, cause in tables.rules.items()})
        self._ledger.forget("identity", set(numbers.identities) - {digest for _, digest in tables.identities.items()})
        self._ledger.forget("endpoint", set(numbers.endpoints) - set(tables.endpoints))
        self._compiler.release_known()

    def _note_change(self) -> None:
        self._in_force.accept()
        self.changes_applied += 1
        self.last_change_s = self._clock()

    # --- interfaces -------------------------------------------------------------------------------------------------

    def _is_searching(self) -> bool:
        """Whether it is time to look for what nobody announces, or to try again what failed."""
        return self._clock() - self._looked_at_s >= SEARCH_S and (
            bool(self._attachments.problems) or self._is_waiting() or self._assignments.is_curious(self._wiring)
        )

    def _is_waiting(self) -> bool:
        """Whether there are both workloads without an interface and interfaces without a workload."""
        bound = self.applier.bindings
        return not self._local.keys() <= bound.keys() and bool(
            self.attached - {binding.ifindex for binding in bound.values()} - set(self._own.interfaces)
        )

    def _look_at_interfaces(self) -> None:
        self._looked_at_s, self._has_looked = self._clock(), True
        bound = {} if self._applier is None else self._applier.bindings
        self._wiring = self._node.snapshot({binding.ifindex for binding in bound.values()})
        encapsulations = self._wiring.tunnels | self.settings.tunnels
        self._derivation.set_tunnels(TUNNELS.union(Tunnel(*one) for one in encapsulations))
        self._locate()

    def _locate(self) -> None:
        """Find the local workloads' interfaces in what was last seen of the node."""
        nodes = self._derivation.world.nodes
        named = (
            nodes.values()
            if self.settings.node is None
            else [nodes[one] for one in (self.settings.node,) if one in nodes]
        )
        before, doubts = self._located, set(self._assignments.doubts.values())
        self._located = self._assignments.look(
            self._wiring,
            self._local.values(),
            node_addresses=[address for node in named for address in node.addresses],
            results=self._plugin_names(),
            is_contested=self._claims.is_contested,
        )
        for key, message in self._located.problems.items() - before.problems.items():
            log.warning("%s: interface: %s", key, message)
        for message in set(self._assignments.doubts.values()) - doubts:
            log.error("%s", message)
        self._note_missing()
        self._save_assignments()

    def _plugin_names(self) -> dict[EndpointKey, set[str]]:
        """Interfaces on the node that plugins made for local workloads; none for those whose plugin leaves none there."""
        found: dict[EndpointKey, set[str]] = {}
        for one in self._wiring.results:
            endpoint = self._local.get(one.pod)
            if endpoint is not None and _is_first(one, endpoint) and (one.names or one.is_unseen):
                found.setdefault(one.pod, set()).update(() if one.is_unseen else one.names)
        for key in self._handovers.pods:
            handed = self._handed(key)
            if handed is not None and key in self._local and self._is_there(handed):
                found[key] = {handed.name}  # newer than what the runtime keeps of an interface before
        return found

    def _is_there(self, handed: Handover) -> bool:
        """Whether the node has the interface that was handed over, with its other end where it was said to be."""
        link = self._wiring.links.get(handed.ifindex)
        return link is not None and (link.name, link.peer) == (handed.name, handed.peer)

    def _note_missing(self) -> None:
        now_s = self._clock()
        found = self._located.interfaces
        missed = [key for key, endpoint in self._local.items() if self._is_expected(endpoint) and key not in found]
        self._missed_s = {key: self._missed_s.get(key, now_s) for key in missed}

    def _is_expected(self, endpoint: Endpoint) -> bool:
        """Whether a workload must be here: without a node's name, any may be elsewhere; without an address, it does not run."""
        return endpoint.node is not None and endpoint.node == self.settings.node and bool(endpoint.addresses)

    def _save_assignments(self) -> None:
        """What was decided about interfaces, before the kernel sees it; what cannot be written is told, and tried again."""
        if self._assignments_file is None or not self._assignments.is_dirty:
            return
        self._assignments_problems = ()
        try:
            self._assignments.save(self._assignments_file)
        except OSError as error:
            message = (
                f"what was decided about interfaces cannot be kept ({error.strerror}): the next agent decides anew"
            )
            place = Location(str(self._assignments_file))
            self._assignments_problems = (Problem(place, "", message, severity="warning", slug="interfaces-file"),)

    def _recall_assignments(self) -> None:
        """Whose interfaces were, as an earlier agent left it: by its file, else by the rows in the kernel."""
        if self._assignments_file is not None:
            problem = self._assignments.load(self._assignments_file)
            if problem is not None:
                log.warning("%s", problem)
                self._assignments_damage = (problem,)
        keys = {number: key for key, number in self._ledger.numbers.endpoints.items() if key.kind != HOST_ENDPOINT}
        attached = self._node.attached()
        for ifindex, number in self._former_numbers().items():
            if number in keys:
                self._assignments.expect(keys[number], ifindex if ifindex in attached else NOWHERE)

    def _gone(self) -> set[int]:
        """Interfaces that went since the last look; when news were lost, all that have not our programs any more."""
        gone = self._node.take_gone()
        return set(self.attached - self._node.attached()) if gone is None else gone

    def _let_go(self, gone: set[int]) -> None:
        """Forget interfaces that went, though others may have their numbers now."""
        if not gone:
            return
        self._attachments.forget(gone)
        self._adoption.forget(gone)
        for key in [key for key, binding in self.applier.bindings.items() if binding.ifindex in gone]:
            self.applier.unbind(key)
        self._node.prune()

    def _take_off_moved(self) -> None:
        """Programs come off interfaces that went to another network namespace while no agent ran: the kernel leaves tcx programs on them."""
        for ifindex in self._node.attached() - self._wiring.links.keys():
            self._attachments.detach(ifindex, f"{ifindex}, which is not in this network namespace any more,")

    def _bindings(self) -> dict[EndpointKey, Binding]:
        """Which interface each local endpoint is on."""
        found = {}
        for key, ifindex in self._located.interfaces.items():
            flags = device_flags(self._wiring.links.get(ifindex))
            if self.settings.is_router(key):
                flags |= EndpointFlag.ROUTES
            sources = self._local[key].allowed_sources if self.settings.borrow_sources else ()
            found[key] = Binding(
                ifindex, allowed_sources=sources, link=self._wiring.link_of(ifindex), flags=flags
            )  # fmt: skip
        return found

    def _wanted_interfaces(self) -> set[int]:
        """Workloads' interfaces, which must bear the programs."""
        candidates = {ifindex for ifindex in self._wiring.links if self._assignments.is_workload(ifindex)}
        return candidates | set(self._located.interfaces.values())

    def _close_and_open(self) -> None:
        """Programs on new interfaces first, then rows for endpoints that were found; rows of those that went."""
        self._attachments.begin_round(self._wiring.links.keys())
        wanted = self._wanted_interfaces()
        for ifindex in wanted - self.attached:
            self._attach(ifindex)
        self.barrier.reconcile(
            self._wiring, wanted, self.attached
        )  # before programs are taken off what is no workload's
        bindings = self._bindings()
        for key, binding in list(self.applier.bindings.items()):
            if binding.kind is EndpointKind.WORKLOAD and key not in bindings:
                self.applier.unbind(key)
        self._no_room.clear()
        self._adoption.go_ahead(self._node, *self._adoptable())
        for key, binding in bindings.items():
            try:
                self.applier.bind(key, binding)
            except MapFullError as error:  # noqa: PERF203 - one endpoint's misfortune is not another's
                message = f"its interface {self._wiring.name_of(binding.ifindex)} stays as it is: {error.message}"
                self._no_room[key] = Problem(self._location(key), "", message, obj=str(key), slug=error.slug)
        self._own.reconcile(self._wiring, wanted)
        self.barrier.reconcile(self._wiring, wanted, self.attached)
        self._adoption.go_behind(self._node, *self._adoptable())

    def _adoptable(self) -> tuple[dict[int, Workload], NodeAddresses]:
        """The workloads whose old connections are looked for, as far as policy for them is in force, and what those depend on."""
        workloads, concerned = {}, self._adoption.concerned
        for key, ifindex in self._located.interfaces.items():
            if ifindex in concerned and key in self.tables.endpoints:
                peer = self._wiring.links[ifindex].peer
                number, addresses = self.tables.endpoints[key].number, self._local[key].addresses
                workloads[ifindex] = Workload(number, addresses, None if peer is None else peer[0])
        return workloads, NodeAddresses(self._wiring.addresses, self._own.inputs.vips)

    def _attach(self, ifindex: int) -> None:
        self._attachments.attach(ifindex, self._wiring.name_of(ifindex))

    # --- drift ------------------------------------------------------------------------------------------------------

    def _look_for_drift(self) -> None:
        """Put back what something else changed; of the rows, the next ones."""
        now_s = self._clock()
        if now_s - self._audited_s < AUDIT_S:
            return
        self._audited_s = now_s
        self._tell_unenforced()
        self._look_for_others()
        self.drift.note(self.barrier.look(), now_s)
        self._unmended = None
        try:
            try:
                self._note_mended(self._node.mend(self.attached), now_s)
            except PartlyMendedError as error:
                self._note_mended(error.found, now_s)
                raise
            if self._is_ahead or self._audit is None:  # the tables are not what is in force
                return
            if self._audit.is_between_rounds:
                if now_s - self._round_s < ROUND_S:
                    return
                self._round_s = now_s
            self.drift.note(self._audit.step(), now_s)
        except PlatformError as error:
            message = f"what something else changed cannot be put back: {error.message}"
            log.error("%s", message)  # noqa: TRY400 - the machine's state, not this code, needs attention
            self._unmended = Problem(Location(""), "", message, slug="drift")

    def _look_for_others(self) -> None:
        """Tell of programs that policy may be passed by. They stay: of two that both want to be first, neither would rest."""
        before = self._other_programs
        try:
            self._other_programs = problems_of(self._node.other_programs(self.attached), self._wiring.name_of)
        except PlatformError as error:
            message = f"whether programs of others pass policy by cannot be told: {error.message}"
            self._other_programs = [Problem(Location(""), "", message, severity="warning", slug=REDIRECT)]
        for one in self._other_programs:
            if one not in before:
                log.log(logging.ERROR if one.severity == "error" else logging.WARNING, "%s", one.message)

    def _note_mended(self, found: Collection[Drift], now_s: float) -> None:
        self.drift.note(found, now_s)
        if any(one.kind == "program" for one in found):
            self.applier.bump_generation()  # of what passed meanwhile, nothing is known

    # --- problems ---------------------------------------------------------------------------------------------------

    def _disputes(self) -> Iterable[Problem]:
        for address, holder, other in self._claims.disputes():
            message = _dispute(address, holder, other)
            severity = "error" if other in self._local else "warning"  # elsewhere it is that node's
            yield Problem(self._location(other), "", message, obj=str(other), severity=severity, slug="address-claimed")

    def _doubts(self) -> Iterable[Problem]:
        for message in self._assignments.doubts.values():
            yield Problem(Location(""), "", message, slug="interface-doubt")

    def _missing(self) -> Iterable[Problem]:
        """Workloads of this node that no interface is known of, and for how long."""
        bound = {binding.ifindex for binding in self.applier.bindings.values()}
        closed = sorted(
            self._wiring.name_of(ifindex) for ifindex in self.attached - bound if self._assignments.is_workload(ifindex)
        )
        where = f"; closed, and perhaps its, are {', '.join(closed[:SHOWN])}" if closed else ""
        for key, since_s in sorted(self._missed_s.items()):
            if self._clock() - since_s >= MISSING_S and key not in self._located.problems:
                message = f"is NOT enforced: no interface of this node is known to be its{where}"
                yield Problem(self._location(key), "", message, obj=str(key), slug="not-found")

    def _unenforced(self) -> list[Problem]:
        """Workloads of this node that policy does not reach as it is written."""
        return [*self._missing(), *self._further_interfaces(), *self._orphans()]

    def _tell_unenforced(self) -> None:
        """Log what is new of them: time alone brings some about."""
        found = {str(one): one for one in self._unenforced()}
        for text in found.keys() - self._told:
            log.log(logging.ERROR if found[text].severity == "error" else logging.WARNING, "%s", text)
        self._told = frozenset(found)

    def _orphans(self) -> Iterable[Problem]:
        """Local workloads whose Namespace is not known, so that no label of it is."""
        for key in sorted(self._local):
            if key.namespace and self._derivation.get(ResourceKey("Namespace", "", key.namespace)) is None:
                message = f"its Namespace {key.namespace} is not among the manifests: no rule matches it by the namespace's labels"
                yield Problem(self._location(key), "", message, obj=str(key), slug="no-namespace")

    def _further_interfaces(self) -> Iterable[Problem]:
        """Interfaces of local workloads that policy does not reach, or that are nobody's."""
        for one in self._wiring.results:
            endpoint = self._local.get(one.pod)
            if endpoint is None:
                continue
            message = ""
            if one.is_unseen:
                message = f"its interface {one.inside} is NOT enforced: packets of {one.plugin} interfaces pass no program on the node"
            elif not _is_first(one, endpoint):
                names = ", ".join(sorted(one.names))
                message = f"its further interface {one.inside} is closed, on the node {names}: policy knows a workload by its first"
            if message:
                yield Problem(self._location(one.pod), "", message, obj=str(one.pod), slug="further-interface")

    def _location_of(self, key: object) -> Location:
        return self._location(key) if isinstance(key, EndpointKey) else Location("")

    def _location(self, key: EndpointKey) -> Location:
        resource = self._derivation.get(key_of_endpoint(key))
        return Location("") if resource is None else resource.meta.location


def _is_first(result: CniResult, endpoint: Endpoint) -> bool:
    """Whether a plugin's result is that of the interface whose addresses policy knows the workload by, and no further one's."""
    return not result.addresses or bool(result.addresses & set(endpoint.addresses))


def key_of_endpoint(key: EndpointKey) -> Any:
    """The key of the resource behind an endpoint."""
    from netpol_ebpf.policy.translate import ResourceKey

    return ResourceKey(key.kind, key.namespace, key.name)


def limits_of(size: Mapping[str, int]) -> Limits:
    """The compiler's limits that follow from the sizes of the maps, by their names."""
    return Limits(
        peer_classes=size["np_peer_class"],
        addresses=size["np_addr4"] + size["np_addr6"],
        cidrs=size["np_cidr4"] + size["np_cidr6"],
        column_blocks=size["np_l4_col"],
        verdicts=size["np_verdict"],
        rules=min(size["np_rule"], size["np_rule_count"] - 1),  # rule 0 is exempt traffic
    )


def _dispute(address: IPAddress, holder: EndpointKey, other: EndpointKey) -> str:
    return f"{address} is claimed by {holder} and by {other}; {holder} had it first, and {other} is closed for it"


def _objects(changes: Changes) -> Iterable[tuple[Any, Any, Any]]:
    """(type, key, new object or None) of everything that changed."""
    kinds: tuple[tuple[type, Mapping[Any, Any]], ...] = (
        (PolicyTier, changes.tiers),
        (Policy, changes.policies),
        (ProfileRules, changes.profiles),
        (Endpoint, changes.endpoints),
        (LabelledNets, changes.network_sets),
        (ClusterNode, changes.nodes),
        (ServiceBackends, changes.services),
    )
    for kind, table in kinds:
        for key, new in table.items():
            yield kind, key, new
    if changes.settings is not None:
        yield PolicySettings, None, changes.settings
