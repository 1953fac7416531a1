# SPDX-License-Identifier: Apache-2.0
"""`Compiler`: objects in, tables and changes out.

The caller gives objects one by one (`upsert`, `remove`) or as a whole world (`replace`); nothing happens until
`commit`, which applies all of it or, with an error, none of it.  The cost of a commit depends on what changed.

Invariants: the tables depend on the present objects alone, up to the numbers in them
(`netpol_ebpf.compiler.canonical`); numbers of unchanged objects do not change; the order of arrival has no effect.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Union

from netpol_ebpf.compiler.canonical import canonical
from netpol_ebpf.compiler.commit import Commit
from netpol_ebpf.compiler.draft import Draft
from netpol_ebpf.compiler.identities import IdentityContent
from netpol_ebpf.compiler.journal import Journal, Unjournaled
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.state import CompilerState, KnownNumbers
from netpol_ebpf.compiler.tables import Change, CompiledTables
from netpol_ebpf.policy.types import (
    ClusterNode,
    Endpoint,
    EndpointKey,
    LabelledNets,
    Policy,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    ServiceBackends,
    World,
)

PolicyObject = Union[
    PolicyTier, Policy, ProfileRules, Endpoint, LabelledNets, ClusterNode, ServiceBackends, PolicySettings
]


def everything(_: Endpoint) -> bool:
    """Every endpoint is local."""
    return True


def key_of(obj: PolicyObject) -> Any:
    """The key of an object among those of its type; None for the settings."""
    if isinstance(obj, (Policy, Endpoint, LabelledNets)):
        return obj.key
    if isinstance(obj, ServiceBackends):
        return (obj.namespace, obj.name)
    return None if isinstance(obj, PolicySettings) else obj.name


class Compiler:
    """Compiles for the endpoints that ``local`` accepts; all others count as peers only.

    ``known``: numbers that an earlier run left in force. An object with a known number keeps it; `release_known` frees
    the rest.
    """

    def __init__(
        self,
        local: Callable[[Endpoint], bool] = everything,
        *,
        limits: Limits | None = None,
        known: KnownNumbers | None = None,
    ) -> None:
        self._local = local
        self._limits = limits or Limits()
        self._known = known or KnownNumbers()
        self._state = CompilerState(self._limits, self._known)
        self._is_new = True
        self._staged: defaultdict[type, dict[Any, PolicyObject | None]] = defaultdict(dict)
        self.tables = CompiledTables()

    @property
    def world(self) -> World:
        """The objects in force; read-only for callers."""
        return self._state.world

    def canonical(self) -> dict[str, Hashable]:
        """The tables' content, independent of history; equal for compilers with equal objects in force."""
        return canonical(self.tables)

    def policies_of(self, endpoint: EndpointKey) -> list[Policy]:
        """The policies that select a compiled endpoint, also staged ones, in the order of their keys."""
        policies = self._state.world.policies
        return [policies[key] for key in sorted(self._state.subjects.policies_of(endpoint)) if key in policies]

    def content_of(self, identity: int) -> IdentityContent:
        """The content of an identity: labels, nets and services that its addresses have in common. Raises KeyError."""
        return self._state.identities.content_of(identity)

    def release_known(self) -> None:
        """Free the rule and endpoint numbers of an earlier run that nothing uses."""
        self._state.release_kept()

    def upsert(self, obj: PolicyObject) -> None:
        """Add an object, or replace the one with its key, at the next commit."""
        self._staged[type(obj)][key_of(obj)] = obj

    def remove(self, kind: type[PolicyObject], key: Any) -> None:
        """Remove the object of that type and key, if it exists, at the next commit; settings return to their defaults."""
        self._staged[kind][key] = PolicySettings() if kind is PolicySettings else None

    def replace(self, world: World) -> None:
        """Replace all objects at the next commit. Earlier uncommitted changes are dropped."""
        self._staged.clear()
        ours = self._state.world
        kinds: tuple[tuple[type, Mapping[Any, Any], Mapping[Any, Any]], ...] = (
            (PolicyTier, ours.tiers, world.tiers),
            (Policy, ours.policies, world.policies),
            (ProfileRules, ours.profiles, world.profiles),
            (Endpoint, ours.endpoints, world.endpoints),
            (LabelledNets, ours.network_sets, world.network_sets),
            (ClusterNode, ours.nodes, world.nodes),
            (ServiceBackends, ours.services, world.services),
        )
        for kind, have, want in kinds:
            for key in have.keys() - want.keys():
                self._staged[kind][key] = None
            for key, obj in want.items():
                if have.get(key) is not obj:
                    self._staged[kind][key] = obj
        self._staged[PolicySettings][None] = world.settings

    def commit(self) -> Change:
        """Apply all changes since the last commit. Returns the rows to write; empty when nothing changed.

        Raises LimitError when a limit would be exceeded; then the tables and the objects in force are as before, and
        the changes are dropped.
        """
        staged, self._staged = self._staged, defaultdict(dict)
        draft = Draft()
        journal = Unjournaled() if self._is_new else Journal()
        with _collector_paused():
            self._state.begin(journal)
            try:
                work = Commit(self._state, staged, self._local, draft, journal)
                work.run()
                work.check_sizes(self.tables)
            except BaseException:
                if self._is_new:
                    self._state = CompilerState(self._limits, self._known)
                else:
                    journal.rollback()
                raise
            finally:
                self._state.end_commit()
            self._is_new = False
            return draft.publish(self.tables)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A context without garbage collection, for a commit.

    A large one makes no cyclic garbage but a million objects that stay. The collector would scan all of them again and
    again: more than half of the time of a cold start.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
