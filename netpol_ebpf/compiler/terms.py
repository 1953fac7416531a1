# SPDX-License-Identifier: Apache-2.0
"""Conditions on one address as values: terms, and conjunctions of them.

Invariant: a term is true or false for an *identity* (the set of an address's owners and of the nets and services that
contain it), and depends on nothing else; conditions on protocol and ports are in `netpol_ebpf.compiler.l4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from netpol_ebpf.policy.types import IPNetwork
from netpol_ebpf.selector import Selector


@dataclass(frozen=True, slots=True)
class SelectorTerm:
    """An endpoint or network set that owns the address has matching labels."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NodeTerm:
    """A node that owns the address has matching labels."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NamedPortTerm:
    """An endpoint that owns the address, and matches the selector if there is one, declares this port by this name."""

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
"""Terms about nets and services that contain the address; they are part of an identity."""
Term = Union[OwnerTerm, AddressGroup]


@dataclass(frozen=True, slots=True)
class AddressMatch:
    """A conjunction: all of ``positive`` are true, none of ``negative``, and the family (4, 6; 0: any) matches."""

    family: int = 0
    positive: frozenset[Term] = frozenset()
    negative: frozenset[Term] = frozenset()

    @property
    def is_family_alone(self) -> bool:
        """Whether the match depends only on the address's family."""
        return not self.positive and not self.negative


ANYONE = AddressMatch()
