# SPDX-License-Identifier: Apache-2.0
"""Interface assignments: whether an interface is the node's own or a workload's, and to which workload it belongs.

An interface is assigned once, to one endpoint for as long as the interface exists, by the strongest `Evidence`. A
workload can forge only one kind of evidence: an address at the far end of a veth pair, because a workload with
CAP_NET_ADMIN can add addresses there. Therefore later addresses do not count as evidence: only the *first addresses*
do, which the agent saw first at the far end, and only while the interface has no assignment.

Invariants: nothing inside a workload's namespace changes an assignment. In a conflict the older assignment stays. An
assigned interface never counts as the node's own. An interface that may be the node's own or a workload's keeps its
present role and is reported. A file in the state directory keeps assignments across restarts; an entry of the file
counts only if it has the form that an agent writes. This module makes no system call except for that file, and does not
attach programs.
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from netpol_ebpf.agent.derived_names import derived_hash, hash_in
from netpol_ebpf.agent.settled import LookInputs, Settled, can_settle, still_settled
from netpol_ebpf.agent.wiring import ETHERNET, NOWHERE, TAP_KINDS, Interface, Wiring
from netpol_ebpf.apply.records import EntryFile, checked, checked_list
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import Endpoint, EndpointKey, IPAddress, IPNetwork

K = TypeVar("K")

log = logging.getLogger(__name__)

FORMAT = 1
MOST_BYTES = 1 << 26
"""Largest file that is read, in bytes. The number is arbitrary: a hundred times what a full node needs."""
POD = "Pod"
IPV4, IPV6 = 4, 6
MOST_IFINDEX = (1 << 31) - 1


class Evidence(enum.IntEnum):
    """Kinds of evidence that an interface belongs to an endpoint, the strongest first."""

    NAMED = 1
    """The endpoint's own object names the interface."""
    CNI = 2
    """The cached result of the CNI plugin, or a handover, names the interface."""
    NAME = 3
    """The interface's name is derived from the pod's name."""
    ROUTE = 4
    """The node has a route through the interface to an address of the endpoint.

    A route to a prefix counts only if the agent cannot read the addresses at the interface's other end."""
    ADDRESS = 5
    """The first addresses seen at the interface's other end are the endpoint's. The workload could have forged them."""


class InterfaceRole(enum.Enum):
    """The role of an interface: the node's own or a workload's."""

    OWN = "own"
    WORKLOAD = "workload"


class Assignment(NamedTuple):
    """The assignment of an interface to an endpoint.

    ``addresses``: the endpoint's addresses when it was last located at this interface; None: not known.
    """

    key: EndpointKey
    evidence: Evidence
    addresses: tuple[IPAddress, ...] | None


@dataclass(frozen=True, slots=True)
class InterfaceRecord:
    """The stored facts about one interface.

    ``side``: its role; None: in doubt. ``first``: its first addresses: the oldest address of each family at its other
    end, at the time when the agent first saw addresses there.
    """

    name: str
    side: InterfaceRole | None = None
    first: tuple[IPAddress, ...] = ()
    assignment: Assignment | None = None


@dataclass(frozen=True, slots=True)
class LocatedEndpoints:
    """The result of a search for interfaces.

    ``interfaces``, ``evidence``: by endpoint. ``problems``: why endpoints get no interface although there is evidence
    of one. An endpoint that is in none of the three is not on this node yet.
    """

    interfaces: Mapping[EndpointKey, int] = field(default_factory=dict)
    evidence: Mapping[EndpointKey, Evidence] = field(default_factory=dict)
    problems: Mapping[EndpointKey, str] = field(default_factory=dict)

    def differences(self, other: LocatedEndpoints) -> list[str]:
        """The endpoints for which this result and the result ``other`` of another search differ."""
        found = _differing(self.interfaces, other.interfaces) | _differing(self.evidence, other.evidence)
        return sorted(map(str, found | _differing(self.problems, other.problems)))


class _Candidate(NamedTuple):
    """An endpoint and the interface that it would get."""

    endpoint: Endpoint
    evidence: Evidence
    ifindex: int


class _Traits(NamedTuple):
    """The properties of an interface that follow from its kind, its name and the agent's options.

    ``is_judged``: the agent must decide whether it is the node's own or a workload's. ``is_possible``: it can be a
    workload's. ``is_bindable``: it may be assigned to an endpoint whose object does not name it. ``name_hash``: the
    hash at the end of a derived name; None if the name is not derived from a pod's.
    """

    link: Interface
    is_judged: bool
    is_possible: bool
    is_bindable: bool
    name_hash: str | None


def may_be_workloads(link: Interface) -> bool:
    """Whether an interface is of a kind that workloads have: one end of a pair into another namespace, or a tap."""
    is_tap = link.kind in TAP_KINDS and link.hardware == ETHERNET  # a tun device is a tunnel of the node
    return link.peer is not None or is_tap


class InterfaceAssignments:
    """Assigns interfaces to endpoints.

    Callers call `look` with each new snapshot of the node's network and when endpoints changed, and `save` when
    ``is_dirty``. ``doubts``: interfaces that may be the node's own or a workload's, each with a message that says how
    the interface is treated.
    """

    def __init__(self, workloads: Sequence[str] = (), own: Sequence[str] = ()) -> None:
        """``workloads``: patterns of interface names; if there are any, exactly the matching interfaces are workloads'.

        ``own``: patterns of names of interfaces that are never a workload's.
        """
        self._workload_patterns, self._own_patterns = tuple(workloads), tuple(own)
        self._seen: dict[int, InterfaceRecord] = {}
        self._lost: set[EndpointKey] = set()  # endpoints whose assigned interface no longer exists
        self._traits: dict[int, _Traits] = {}  # of the interfaces of the last wiring
        self._settled: dict[int, Settled] = {}
        self._last = LookInputs(Wiring(), {}, frozenset(), {})  # the inputs of the look that left them settled
        self.doubts: dict[int, str] = {}
        self.is_dirty = False
        self._is_recalled = False
        self._written: dict[
            int, tuple[InterfaceRecord, str]
        ] = {}  # encoded for the file, so that a new interface costs one encoding

    def look(
        self,
        wiring: Wiring,
        endpoints: Collection[Endpoint],
        *,
        node_addresses: Collection[IPAddress] = (),
        results: Mapping[EndpointKey, Collection[str]] | None = None,
        is_contested: Callable[[EndpointKey], bool] = lambda _key: False,
    ) -> LocatedEndpoints:
        """Decide the role of each interface, and find the interface of each endpoint. Earlier assignments stay.

        ``node_addresses``: the addresses in this node's Node object. ``results``: names of the interfaces that CNI
        plugins made for each pod; no name if the plugin left no interface on the node. ``is_contested``: whether other
        workloads claim an address of an endpoint; such an endpoint keeps its present interface and gets no other one.

        A settled assignment is not decided again (`netpol_ebpf.agent.settled`). Cost: linear in the numbers of
        endpoints, links and routes, and small for a settled assignment.
        """
        before = dict(self._seen)
        self._forget_gone(wiring)
        self._traits = self._traits_in(wiring)
        if self._is_recalled:
            self._settled = {}
            self._release_unbindable()
        self._is_recalled = False
        self._release_named(wiring, endpoints)
        stated = frozenset(wiring.addresses[one] for one in node_addresses if one in wiring.addresses)
        now = LookInputs(wiring, {one.key: one for one in endpoints}, stated, results or {})
        settled = still_settled(self._settled, self._last, now, self._seen)
        located = {one.endpoint.key for one in settled.values()}
        others = [one for one in endpoints if one.key not in located]
        trusted = _TrustedEvidence(now, self._traits.values() if others else ())
        traces = {endpoint.key: trusted.beyond_reach(endpoint) for endpoint in others}
        self.doubts = {}
        self._decide_roles(now, {ifindex for _, found in traces.values() for ifindex in found}, settled)
        held = {one.assignment.key: ifindex for ifindex, one in self._seen.items() if one.assignment is not None}
        problems: dict[EndpointKey, str] = {}
        wanted = self._wanted(others, traces, held, wiring, is_contested, problems)
        for ifindex in wanted.keys() & settled.keys():  # others want it as well: it is decided again
            one = settled.pop(ifindex)
            wanted[ifindex].append(_Candidate(one.endpoint, one.evidence, ifindex))
        interfaces = {one.endpoint.key: ifindex for ifindex, one in settled.items()}
        by = {one.endpoint.key: one.evidence for one in settled.values()}
        self._lost.difference_update(interfaces)
        for ifindex, claims in wanted.items():
            winner = self._choose(ifindex, claims, wiring, problems)
            if winner is None:
                continue
            key = winner.endpoint.key
            interfaces[key] = ifindex
            by[key] = self._bind(ifindex, winner, wiring)
            record = self._seen[ifindex]
            is_as_before = before.get(ifindex) is record and held.get(key) == ifindex
            leads_nowhere_else = len(claims) == 1 and traces[key][1] <= {ifindex}
            if is_as_before and leads_nowhere_else and can_settle(winner.endpoint, ifindex, now):
                settled[ifindex] = Settled(winner.endpoint, by[key], record)
        self._settled, self._last = settled, now
        return LocatedEndpoints(interfaces, by, problems)

    def unsettled(self) -> InterfaceAssignments:
        """A copy of these assignments in which none is settled, so that its next `look` decides everything."""
        copy = InterfaceAssignments(self._workload_patterns, self._own_patterns)
        copy._seen, copy._lost, copy._written = dict(self._seen), set(self._lost), dict(self._written)  # noqa: SLF001 - of the same class
        copy._is_recalled, copy.is_dirty = self._is_recalled, self.is_dirty  # noqa: SLF001 - of the same class
        return copy

    def differences(self, other: InterfaceAssignments) -> list[str]:
        """Names of the interfaces and endpoints for which other assignments decided differently."""
        interfaces = _differing(self._seen, other._seen) | _differing(self.doubts, other.doubts)  # noqa: SLF001 - of the same class
        known = {**other._seen, **self._seen}  # noqa: SLF001 - of the same class
        return sorted({known[one].name for one in interfaces} | {str(one) for one in self._lost ^ other._lost})  # noqa: SLF001 - of the same class

    def _wanted(
        self,
        endpoints: Iterable[Endpoint],
        traces: Mapping[EndpointKey, tuple[Evidence, set[int]]],
        held: Mapping[EndpointKey, int],
        wiring: Wiring,
        is_contested: Callable[[EndpointKey], bool],
        problems: dict[EndpointKey, str],
    ) -> dict[int, list[_Candidate]]:
        """The endpoints that would get each interface, by interface index. Adds to ``problems``.

        ``traces``: for each endpoint, the strongest evidence that a workload cannot forge, and the interfaces that it
        gives. ``held``: the present interface of each endpoint.
        """
        wanted: dict[int, list[_Candidate]] = {}
        first: _FirstAddresses | None = None  # made only if an endpoint needs it
        for endpoint in endpoints:
            evidence, found = traces[endpoint.key]
            if evidence is Evidence.ADDRESS:
                first = first or _FirstAddresses(self._seen)
                found = first.of(endpoint)
            trace, problem = self._trace(endpoint, evidence, found, held.get(endpoint.key), wiring, is_contested)
            if problem:
                problems[endpoint.key] = problem
            if trace is not None:
                wanted.setdefault(trace.ifindex, []).append(trace)
        return wanted

    def decide_roles(self, wiring: Wiring) -> None:
        """Decide the role of each interface before any endpoint is known. Assignments stay."""
        self._forget_gone(wiring)
        self._traits = self._traits_in(wiring)
        self._settled = {}
        self.doubts = {}
        self._decide_roles(LookInputs(wiring, {}, frozenset(), {}), (), ())

    @property
    def assigned(self) -> set[int]:
        """Indices of the interfaces that are assigned to an endpoint."""
        return {ifindex for ifindex, one in self._seen.items() if one.assignment is not None}

    def first_addresses(self, ifindex: int) -> tuple[IPAddress, ...]:
        """The oldest address of each family at an interface's other end, when addresses were first seen there."""
        seen = self._seen.get(ifindex)
        return () if seen is None else seen.first

    def _forget_gone(self, wiring: Wiring) -> None:
        """Remove interfaces that no longer exist, and interfaces whose index another interface has now.

        The index is checked once, for records of an earlier agent: the interface must have the recorded name. A record
        without a name passes the check.
        """
        self.forget(self._seen.keys() - wiring.links.keys())
        if self._is_recalled:
            names = {ifindex: (wiring.links[ifindex].name, "") for ifindex in self._seen}
            self.forget([ifindex for ifindex, one in self._seen.items() if one.name not in names[ifindex]])

    def _release_named(self, wiring: Wiring, endpoints: Iterable[Endpoint]) -> None:
        """Release interfaces that were assigned because an object named them, if no object names them any more.

        The workload cannot have caused this, because it does not write the objects.
        """
        named = {(one.key, one.interface) for one in endpoints if one.interface is not None}
        for ifindex, seen in self._seen.items():
            assignment = seen.assignment
            if assignment is None or assignment.evidence is not Evidence.NAMED:
                continue
            if (assignment.key, wiring.name_of(ifindex)) not in named:
                self._keep(ifindex, replace(seen, side=None, assignment=None))

    def _release_unbindable(self) -> None:
        """Release interfaces that an earlier agent assigned, but which the options of this agent exclude."""
        for ifindex, seen in self._seen.items():
            if (
                seen.assignment is not None
                and seen.assignment.evidence is not Evidence.NAMED
                and not self._traits[ifindex].is_bindable
            ):
                self._keep(ifindex, replace(seen, side=None, assignment=None))

    def is_curious(self, wiring: Wiring) -> bool:
        """Whether addresses may still appear for the first time at the other end of some interface."""
        peers = {ifindex for ifindex, link in wiring.links.items() if link.peer is not None}
        return any(
            seen.side is not InterfaceRole.OWN and seen.assignment is None and not seen.first and ifindex in peers
            for ifindex, seen in self._seen.items()
        )

    # --- own or workload's ------------------------------------------------------------------------------------------

    def close_newborn(self, link: Interface) -> bool:
        """Whether an interface that just appeared must be closed. If its role is in doubt, it must."""
        if link.ifindex in self._seen or not self._traits_of(link).is_possible:
            return False
        self._keep(link.ifindex, InterfaceRecord(link.name, InterfaceRole.WORKLOAD))
        return True

    @property
    def workloads(self) -> set[int]:
        """Interfaces that count as workloads', so that they are closed until their workloads are known."""
        return {ifindex for ifindex, seen in self._seen.items() if seen.side is InterfaceRole.WORKLOAD}

    def is_workload(self, ifindex: int) -> bool:
        """Whether an interface counts as a workload's, so that it is closed until its workload is known."""
        seen = self._seen.get(ifindex)
        return seen is not None and seen.side is InterfaceRole.WORKLOAD

    def _traits_in(self, wiring: Wiring) -> dict[int, _Traits]:
        """The traits of all interfaces, by index. An interface that did not change since the last call costs little."""
        before, found = self._traits, {}
        for ifindex, link in wiring.links.items():
            known = before.get(ifindex)
            found[ifindex] = known if known is not None and known.link is link else self._traits_of(link)
        return found

    def _traits_of(self, link: Interface) -> _Traits:
        is_named = any(fnmatchcase(link.name, pattern) for pattern in self._workload_patterns)
        is_own = any(fnmatchcase(link.name, pattern) for pattern in self._own_patterns)
        is_kind = may_be_workloads(link)
        is_possible = is_named if self._workload_patterns else is_kind and not is_own
        return _Traits(
            link,
            is_judged=is_kind or bool(self._workload_patterns),
            is_possible=is_possible,
            is_bindable=(is_named or is_kind) and not is_own,
            name_hash=hash_in(link.name),
        )

    def _decide_roles(self, now: LookInputs, claimed: Collection[int], settled: Collection[int]) -> None:
        """Decide the role of every interface.

        ``claimed``: interfaces of endpoints by evidence that a workload cannot forge. ``settled``: interfaces with a
        settled assignment; they are workloads', and their records stay.
        """
        wiring = now.wiring
        for ifindex, traits in self._traits.items():
            if not traits.is_judged or ifindex in settled:
                continue
            link = traits.link
            seen = self._seen.get(ifindex) or InterfaceRecord(link.name)
            side = self._side(traits, wiring, seen, is_stated=ifindex in now.stated, is_claimed=ifindex in claimed)
            if seen.side not in (None, side):
                log.warning("interface %s is %s", link.name, _SAID[side])
            first = seen.first
            if not first and link.peer is not None:
                first = _oldest(wiring.peer_addresses.get(link.peer, ()))
            if (seen.name, seen.side, seen.first) != (link.name, side, first):
                seen = replace(seen, name=link.name, side=side, first=first)
            self._keep(ifindex, seen)

    def _side(
        self, traits: _Traits, wiring: Wiring, seen: InterfaceRecord, *, is_stated: bool, is_claimed: bool
    ) -> InterfaceRole | None:
        """The role of an interface; None if it is in doubt.

        Such an interface is treated as the node's own until there is evidence.
        """
        link = traits.link
        if self._workload_patterns:
            return InterfaceRole.WORKLOAD if traits.is_possible else InterfaceRole.OWN
        if seen.assignment is not None or is_claimed:
            return InterfaceRole.WORKLOAD
        is_routed = link.ifindex in wiring.uplinks or link.ifindex in wiring.next_hops
        if not traits.is_possible or is_stated or is_routed or seen.side is InterfaceRole.OWN:
            return InterfaceRole.OWN
        if link.ifindex in wiring.shared:
            is_closed = seen.side is InterfaceRole.WORKLOAD
            self.doubts[link.ifindex] = (
                f"interface {link.name} may be the node's own or a workload's: the node has an address there, but no route leads "
                f"on from it; it is {'closed' if is_closed else 'NOT enforced, as an own one,'} until --own-interfaces or "
                "--workload-interfaces names it, or a workload is known to be there"
            )
            return seen.side
        return InterfaceRole.WORKLOAD

    # --- assignment ---------------------------------------------------------------------------------------------------

    def _trace(
        self, endpoint: Endpoint, evidence: Evidence, found: set[int], old: int | None, wiring: Wiring,
        is_contested: Callable[[EndpointKey], bool],
    ) -> tuple[_Candidate | None, str]:  # fmt: skip
        """The interface that an endpoint would get, and a text with the problem, "" if there is none.

        ``old``: the endpoint's present interface. ``found``: the interfaces that ``evidence`` gives.
        """
        assignment = self._seen[old].assignment if old is not None else None
        kept = None
        if old is not None and assignment is not None and endpoint.interface is None and _is_same(assignment, endpoint):
            kept = _Candidate(endpoint, assignment.evidence, old)
        if kept is not None and kept.ifindex in found:
            return (kept if kept.evidence <= evidence else _Candidate(endpoint, evidence, kept.ifindex)), ""
        if kept is not None and (not found or evidence is Evidence.ADDRESS):
            return kept, ""
        if not found:
            return None, ""
        if len(found) > 1:
            names = ", ".join(sorted(wiring.links[ifindex].name for ifindex in found))
            return kept, f"its addresses lead to several interfaces: {names}"
        (ifindex,) = found
        if (old is not None or endpoint.key in self._lost) and is_contested(endpoint.key):
            return kept, f"{wiring.name_of(ifindex)} has an address that others claim as well"
        return _Candidate(endpoint, evidence, ifindex), ""

    def _choose(
        self, ifindex: int, traces: Sequence[_Candidate], wiring: Wiring, problems: dict[EndpointKey, str]
    ) -> _Candidate | None:
        """Choose one endpoint for an interface for which endpoints have evidence; None if none can be chosen.

        Each endpoint that is not chosen gets an entry in ``problems`` with the reason.
        """
        assignment = self._seen[ifindex].assignment if ifindex in self._seen else None
        if len(traces) == 1 and assignment is not None and traces[0].endpoint.key == assignment.key:
            return traces[0]
        name = wiring.name_of(ifindex)
        holder = next((one for one in traces if assignment is not None and one.endpoint.key == assignment.key), None)
        best = min(one.evidence for one in traces)
        strongest = [one for one in traces if one.evidence is best]
        if holder is not None and holder in strongest:
            winner: _Candidate | None = holder
        elif assignment is not None and holder is None and best is Evidence.ADDRESS:
            for one in traces:
                problems[one.endpoint.key] = (
                    f"interface {name} belonged to {assignment.key}: an address at its other end gives it to no other workload"
                )
            return None
        else:
            winner = strongest[0] if len(strongest) == 1 else None
        if winner is None:
            others = ", ".join(str(key) for key in sorted(one.endpoint.key for one in traces))
            problems.update(
                {
                    one.endpoint.key: f"interface {name} belongs to several by evidence of the same strength: {others}"
                    for one in traces
                }
            )
            return None
        problems.update(
            {
                one.endpoint.key: f"interface {name} belongs to {winner.endpoint.key}"
                for one in traces
                if one is not winner
            }
        )
        return winner

    def _bind(self, ifindex: int, trace: _Candidate, wiring: Wiring) -> Evidence:
        name, endpoint, evidence = wiring.links[ifindex].name, trace.endpoint, trace.evidence
        seen = self._seen.get(ifindex) or InterfaceRecord(name)
        if seen.assignment is not None and seen.assignment.key == endpoint.key:
            evidence = min(evidence, seen.assignment.evidence)
        self.doubts.pop(ifindex, None)
        self._lost.discard(endpoint.key)
        assignment = Assignment(endpoint.key, evidence, endpoint.addresses)
        if (seen.name, seen.side, seen.assignment) != (name, InterfaceRole.WORKLOAD, assignment):
            self._keep(ifindex, replace(seen, name=name, side=InterfaceRole.WORKLOAD, assignment=assignment))
        return evidence

    def forget(self, gone: Iterable[int]) -> None:
        """Remove interfaces that no longer exist."""
        for ifindex in gone:
            seen = self._seen.pop(ifindex, None)
            if seen is not None:
                self.is_dirty = True
                if seen.assignment is not None:
                    self._lost.add(seen.assignment.key)

    def _keep(self, ifindex: int, seen: InterfaceRecord) -> None:
        before = self._seen.get(ifindex)
        if before is not seen and before != seen:
            self._seen[ifindex] = seen
            self.is_dirty = True

    # --- beyond the process -----------------------------------------------------------------------------------------

    def load(self, path: Path) -> Problem | None:
        """Load the assignments that an earlier agent stored.

        If entries are invalid, they are reported, the file is renamed so that nothing overwrites it, and their
        interfaces are assigned anew.
        """
        self._seen = {}

        def take(entry: tuple[str, Any]) -> None:
            ifindex, written = entry
            try:
                self._seen[_read_ifindex(ifindex)] = _read_seen(written)
            except ValueError as error:
                raise ValueError(f"interface {ifindex!r}: {error}") from error
            self._is_recalled = True

        damage = _file_at(path).load(take)
        if not damage:
            return None
        self.is_dirty = True
        message = (
            f"the assignments of interfaces are {damage}: the agent keeps the valid ones and decides the others anew"
        )
        return Problem(Location(str(path)), "", message, severity="warning", slug="interfaces-file")

    def expect(self, key: EndpointKey, ifindex: int) -> None:
        """Restore an earlier agent's assignment from a row in the kernel, if the file does not have it.

        ``ifindex``: NOWHERE if the interface no longer exists.
        """
        seen = self._seen.get(ifindex)
        if ifindex == NOWHERE:
            self._lost.add(key)
        elif seen is None or seen.assignment is None:
            assignment = Assignment(key, Evidence.ADDRESS, None)
            self._is_recalled = True
            self._keep(
                ifindex, replace(seen or InterfaceRecord(""), side=InterfaceRole.WORKLOAD, assignment=assignment)
            )

    def save(self, path: Path) -> None:
        """Write the assignments to the file atomically. Raises OSError."""
        before, self._written = self._written, {}
        for ifindex, seen in self._seen.items():
            known = before.get(ifindex)
            if known is None or known[0] is not seen:
                known = seen, json.dumps(_write_seen(seen))
            self._written[ifindex] = known
        _file_at(path).save(f'"{ifindex}": {text}' for ifindex, (_, text) in self._written.items())
        self.is_dirty = False


_SAID = {
    InterfaceRole.OWN: "the node's own now, and no workload's",
    InterfaceRole.WORKLOAD: "a workload's now: it is closed until its workload is known",
    None: "in doubt",
}


class _TrustedEvidence:
    """Finds the interfaces of endpoints by evidence that a workload cannot forge."""

    def __init__(self, now: LookInputs, traits: Collection[_Traits]) -> None:
        """``traits``: the traits of all interfaces."""
        self._wiring, self._results = now.wiring, now.results
        # These are certainly the node's own, although a route to an endpoint leads there.  A route alone proves
        # nothing: the node's route to a macvlan pod may use a macvlan device of its own, which the pod's other packets
        # do not pass.
        self._closed_to_routes = now.wiring.uplinks | now.stated
        self._by_name = {one.link.name: one.link.ifindex for one in traits}
        self._bindable = {one.link.ifindex for one in traits if one.is_bindable}
        self._by_hash = {one.name_hash: one.link.ifindex for one in traits if one.name_hash and one.is_bindable}
        self._subnets = _by_length(now.wiring.subnets)
        self._ways = [(Evidence.ROUTE, self._by_route)]  # strongest first, only kinds that can apply here
        if self._by_hash:
            self._ways.insert(0, (Evidence.NAME, self._by_derived_name))
        if now.results:
            self._ways.insert(0, (Evidence.CNI, self._by_result))

    def beyond_reach(self, endpoint: Endpoint) -> tuple[Evidence, set[int]]:
        """The kind and the interfaces of an endpoint's strongest evidence, without evidence that a workload can forge.

        If the CNI plugin reported that it left no interface on the node, the result is CNI without interfaces. If the
        endpoint has no evidence of these kinds, the result is ADDRESS without interfaces.
        """
        if endpoint.interface is not None:
            named = self._by_name.get(endpoint.interface)
            return Evidence.NAMED, set() if named is None else {named}
        if endpoint.key in self._results and not self._results[endpoint.key]:
            return Evidence.CNI, set()
        for evidence, find in self._ways:
            found = find(endpoint)
            if found:
                return evidence, found
        return Evidence.ADDRESS, set()

    def _by_result(self, endpoint: Endpoint) -> set[int]:
        named = {self._by_name.get(name, NOWHERE) for name in self._results.get(endpoint.key, ())}
        return {ifindex for ifindex in named if ifindex in self._bindable}

    def _by_derived_name(self, endpoint: Endpoint) -> set[int]:
        ifindex = self._by_hash.get(derived_hash(endpoint.key)) if endpoint.key.kind == POD else None
        return set() if ifindex is None else {ifindex}

    def _by_route(self, endpoint: Endpoint) -> set[int]:
        found = set()
        for address in endpoint.addresses:
            ifindex = self._wiring.host_routes.get(address)
            if ifindex is None:
                ifindex = self._by_subnet(address)
            if ifindex is not None and ifindex in self._bindable and ifindex not in self._closed_to_routes:
                found.add(ifindex)
        return found

    def _by_subnet(self, address: IPAddress) -> int | None:
        """The only interface of the longest subnet that contains the address; None for one end of a veth pair.

        Behind a veth pair the subnet may contain many workloads. Only the addresses at the pair's other end show which
        workload is there, and the workload chooses those addresses.
        """
        found = self._longest_match(address)
        if len(found) != 1:
            return None
        (ifindex,) = found
        link = self._wiring.links.get(ifindex)
        return ifindex if link is None or link.peer is None else None

    def _longest_match(self, address: IPAddress) -> Collection[int]:
        """The interfaces to the longest directly connected prefix that contains an address."""
        for version, host_bits, nets in self._subnets:
            if version == address.version:
                found = nets.get(int(address) >> host_bits)
                if found is not None:
                    return found
        return ()


def _by_length(
    subnets: Mapping[IPNetwork, Collection[int]],
) -> list[tuple[int, int, dict[int, Collection[int]]]]:
    """The interfaces of prefixes as a list of (IP version, host bits, map), longest prefix first.

    The map has the interfaces of each prefix. Its key is the prefix's network bits as an integer.
    """
    found: dict[tuple[int, int], dict[int, Collection[int]]] = {}
    for net, interfaces in subnets.items():
        host_bits = net.max_prefixlen - net.prefixlen
        found.setdefault((host_bits, net.version), {})[int(net.network_address) >> host_bits] = interfaces
    return [(version, host_bits, found[host_bits, version]) for host_bits, version in sorted(found)]


class _FirstAddresses:
    """Finds the interface of an endpoint by an address of the endpoint.

    ``seen``: for each interface, the addresses that its other end had when the agent first saw any there.
    """

    def __init__(self, seen: Mapping[int, InterfaceRecord]) -> None:
        self._seen = seen
        self._by_address: dict[IPAddress, set[int]] = {}
        for ifindex, one in seen.items():
            for address in one.first if one.side is not InterfaceRole.OWN else ():
                self._by_address.setdefault(address, set()).add(ifindex)

    def of(self, endpoint: Endpoint) -> set[int]:
        """The interfaces with first addresses of the endpoint at their other ends.

        Interfaces that are assigned to another endpoint are returned only if there are no others.
        """
        candidates = {ifindex for address in endpoint.addresses for ifindex in self._by_address.get(address, ())}
        found = {ifindex for ifindex in candidates if self._speaks_for(ifindex, endpoint)}
        free = {ifindex for ifindex in found if self._is_free(ifindex, endpoint)}
        return free or found

    def _speaks_for(self, ifindex: int, endpoint: Endpoint) -> bool:
        """Whether the first addresses at an interface's other end fit the endpoint.

        Each first address must be an address of the endpoint. A first address of a family of which the endpoint has no
        address is ignored.
        """
        families = {address.version for address in endpoint.addresses}
        return all(one in endpoint.addresses for one in self._seen[ifindex].first if one.version in families)

    def _is_free(self, ifindex: int, endpoint: Endpoint) -> bool:
        assignment = self._seen[ifindex].assignment
        return assignment is None or assignment.key == endpoint.key


def _oldest(addresses: Sequence[IPAddress]) -> tuple[IPAddress, ...]:
    """The oldest address of each family that is not link-local.

    ``addresses``: in the kernel's order, which is oldest first for IPv4 and newest first for IPv6.
    """
    if not addresses:
        return ()
    found = [[one for one in addresses if one.version == version and not one.is_link_local] for version in (IPV4, IPV6)]
    return (*found[0][:1], *found[1][-1:])


def _differing(one: Mapping[K, object], other: Mapping[K, object]) -> set[K]:
    """The keys for which the two mappings have different values."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def _is_same(assignment: Assignment, endpoint: Endpoint) -> bool:
    """Whether the endpoint is the one that was assigned, not a new pod of the same name with other addresses."""
    if assignment.addresses is None or assignment.addresses == endpoint.addresses:
        return True
    return bool(set(assignment.addresses) & set(endpoint.addresses))


def _file_at(path: Path) -> EntryFile:
    return EntryFile(path, "interfaces", FORMAT, MOST_BYTES, is_keyed=True)


def _write_seen(seen: InterfaceRecord) -> dict[str, Any]:
    written: dict[str, Any] = {
        "name": seen.name,
        "side": seen.side and seen.side.value,
        "first": [*map(str, seen.first)],
    }
    if seen.assignment is not None:
        addresses = seen.assignment.addresses
        written["bond"] = {
            "endpoint": [seen.assignment.key.kind, seen.assignment.key.namespace, seen.assignment.key.name],
            "evidence": seen.assignment.evidence.name,
            "addresses": None if addresses is None else [*map(str, addresses)],
        }
    return written


def _read_ifindex(written: str) -> int:
    if not written.isascii() or not written.isdecimal() or not NOWHERE < int(written) <= MOST_IFINDEX:
        raise ValueError("it is not the number of an interface")
    return int(written)


def _read_seen(written: Any) -> InterfaceRecord:
    """Parse the record of one interface from the file. Raises ValueError."""
    fields = checked(written, dict, "it")
    side, assignment = fields.get("side"), fields.get("bond")
    return InterfaceRecord(
        checked(fields.get("name"), str, "its name"),
        None if side is None else InterfaceRole(checked(side, str, "its side")),
        _oldest(_read_addresses(fields.get("first"))),
        None if assignment is None else _read_assignment(checked(assignment, dict, "its bond")),
    )


def _read_assignment(fields: dict[Any, Any]) -> Assignment:
    evidence, addresses = checked(fields.get("evidence"), str, "the evidence"), fields.get("addresses")
    if evidence not in Evidence.__members__:
        raise ValueError(f"{evidence!r} is not a kind of evidence")
    return Assignment(
        EndpointKey(*checked_list(fields.get("endpoint"), str, "an endpoint", 3)),
        Evidence[evidence],
        None if addresses is None else _read_addresses(addresses),
    )


def _read_addresses(written: Any) -> tuple[IPAddress, ...]:
    return tuple(map(ip_address, checked_list(written, str, "addresses")))
