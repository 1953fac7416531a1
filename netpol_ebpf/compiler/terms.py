# SPDX-License-Identifier: Apache-2.0
"""What can be said of one address, as values: terms, and conjunctions of them.

Invariant: a term is true or false of an *identity* (the set of an address's owners and of the nets and services that it
is in), never of more than that; whatever else a rule says is about protocol and ports (`netpol_ebpf.compiler.l4`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from netpol_ebpf.policy.types import IPNetwork
from netpol_ebpf.selector import Selector


@dataclass(frozen=True, slots=True)
class SelectorTerm:
    """Some endpoint or network set that owns the address has labels that match."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NodeTerm:
    """Some node that owns the address has labels that match."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NamedPortTerm:
    """Some endpoint that owns the address, and matches the selector if there is one, declares this port by this name."""

    selector: Selector | None
    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class NetsTerm:
    """One of the nets contains the address. No net contains another, none is a default route."""

    nets: frozenset[IPNetwork]


@dataclass(frozen=True, slots=True)
class ServiceTerm:
    """The address is a backend of the service; with a protocol: on this very protocol and port."""

    namespace: str
    name: str
    protocol: int = 0
    port: int = 0


OwnerTerm = Union[SelectorTerm, NodeTerm, NamedPortTerm]
"""Terms about who owns the address."""
AddressGroup = Union[NetsTerm, ServiceTerm]
"""Terms about what contains the address; they are part of an identity."""
Term = Union[OwnerTerm, AddressGroup]


@dataclass(frozen=True, slots=True)
class AddressMatch:
    """All of ``positive`` are true, none of ``negative``, and the family (4, 6; 0: any) is right."""

    family: int = 0
    positive: frozenset[Term] = frozenset()
    negative: frozenset[Term] = frozenset()

    @property
    def is_family_alone(self) -> bool:
        """Whether the match depends on no more of an address than its family."""
        return not self.positive and not self.negative


ANYONE = AddressMatch()
