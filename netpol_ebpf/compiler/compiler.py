# SPDX-License-Identifier: Apache-2.0
"""`Compiler`: compiles objects of the policy model into tables, and changes of objects into changes of tables.

The caller gives objects one by one (`upsert`, `remove`) or as a whole world (`replace`).  `commit` applies all these
changes; if it raises an error, it applies none of them.  The cost of a commit depends on the size of the changes, not
on the size of the world.

Invariants: apart from the numbers in them (`netpol_ebpf.compiler.canonical`), the tables depend on the present objects
alone, not on the order in which the objects came.  Numbers of unchanged objects do not change.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
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
    PolicyKey,
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
    """Accepts every endpoint. A `Compiler` with this function as ``local`` compiles for all endpoints."""
    return True


def key_of(obj: PolicyObject) -> Any:
    """The key of ``obj`` among the objects of its type. None for `PolicySettings`, of which only one object exists."""
    if isinstance(obj, (Policy, Endpoint, LabelledNets)):
        return obj.key
    if isinstance(obj, ServiceBackends):
        return (obj.namespace, obj.name)
    return None if isinstance(obj, PolicySettings) else obj.name


class Compiler:
    """Compiles policy for the endpoints that ``local`` accepts.

    All other endpoints are peers only.
    ``known``: numbers of an earlier run that rows in the kernel still have.  An object with a known number keeps the
    number; `release_known` frees the numbers that no object uses.
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
        self._seen_names: set[str] = set()
        self._forgotten_classes: set[int] = set()
        self._staged: defaultdict[type, dict[Any, PolicyObject | None]] = defaultdict(dict)
        self.tables = CompiledTables()

    @property
    def world(self) -> World:
        """The objects in force; read-only for callers."""
        return self._state.world

    def canonical(self) -> dict[str, Hashable]:
        """The canonical form of the tables. Compilers with equal objects in force have equal canonical forms."""
        return canonical(self.tables)

    def policies_of(self, endpoint: EndpointKey) -> list[Policy]:
        """The policies, staged ones included, that select a local endpoint, in the order of their keys."""
        policies = self._state.world.policies
        return [policies[key] for key in sorted(self._state.subjects.policies_of(endpoint)) if key in policies]

    def selecting(self) -> set[PolicyKey]:
        """The policies, staged ones included, that select a local endpoint, as a new set."""
        return self._state.subjects.selecting()

    def content_of(self, identity: int) -> IdentityContent:
        """The labels, nets and services that all addresses of an identity have in common.

        Raises KeyError if no identity in use has this number.
        """
        return self._state.identities.content_of(identity)

    def wants_name(self, name: str) -> bool:
        """Whether a wildcard inside a name matches ``name``, which has no row of its own yet."""
        return self._state.stores.names.wants(name)

    def see_names(self, names: Iterable[str]) -> None:
        """Give rows of their own, at the next commit, to names that endpoints asked for.

        Needed for names that only a wildcard inside a name (``x.*.com``) can match; all other names are ignored.
        """
        self._seen_names.update(names)

    def unused_name_classes(self) -> frozenset[int]:
        """The name classes that no pattern gives any more. Endpoints may still have learned them."""
        return self._state.stores.names.unused

    def forget_name_classes(self, numbers: Iterable[int]) -> None:
        """Let unused name classes go at the next commit. The caller must know that no endpoint has learned them."""
        self._forgotten_classes.update(numbers)

    def release_known(self) -> None:
        """Free the rule and endpoint numbers of an earlier run that no object uses."""
        self._state.release_kept()

    def upsert(self, obj: PolicyObject) -> None:
        """Add an object, or replace the object with the same type and key, at the next commit."""
        self._staged[type(obj)][key_of(obj)] = obj

    def remove(self, kind: type[PolicyObject], key: Any) -> None:
        """Remove the object of this type and key, if any, at the next commit.

        Removed settings return to their defaults.
        """
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
        """Apply all changes since the last commit. Returns the rows to write; the result is empty if nothing changed.

        Raises LimitError if a limit would be exceeded.  Then the tables and the objects in force are unchanged, and the
        uncommitted changes are dropped.
        """
        staged, self._staged = self._staged, defaultdict(dict)
        draft = Draft()
        journal = Unjournaled() if self._is_new else Journal()
        with _collector_paused():
            self._state.begin(journal)
            try:
                work = Commit(self._state, staged, self._local, draft, journal)
                self._take_names(journal)
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

    def _take_names(self, journal: Journal) -> None:
        """Hand over what the caller said of names since the last commit."""
        names = self._state.stores.names
        names.forget(self._forgotten_classes, journal)
        names.see(self._seen_names)
        self._forgotten_classes, self._seen_names = set(), set()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector during a commit.

    A large commit creates a million objects that stay in use, and no cyclic garbage.  The collector would scan these
    objects again and again, which would take more than half of the time of a cold start.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
