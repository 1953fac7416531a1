# SPDX-License-Identifier: Apache-2.0
"""Predicates on one address as values: terms, and conjunctions of terms.

Invariant: whether a term is true depends only on the *identity* of an address: the address's owners, and the nets and
services that contain it.  Predicates on protocol and ports are in `netpol_ebpf.compiler.l4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from netpol_ebpf.policy.types import IPNetwork
from netpol_ebpf.selector import Selector


@dataclass(frozen=True, slots=True)
class SelectorTerm:
    """True if the selector matches the labels of an endpoint or network set that has or contains the address."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NodeTerm:
    """True if the selector matches the labels of a node that has the address."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class NamedPortTerm:
    """True if an endpoint with the address declares this port by this name, and the selector (if any) matches it."""

    selector: Selector | None
    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class NetsTerm:
    """True if one of the nets contains the address. No net contains another net, and none is a default route."""

    nets: frozenset[IPNetwork]


@dataclass(frozen=True, slots=True)
class ServiceTerm:
    """True if the address is a backend of the service; with a ``protocol``, if it is one on this protocol and port."""

    namespace: str
    name: str
    protocol: int = 0
    port: int = 0


OwnerTerm = Union[SelectorTerm, NodeTerm, NamedPortTerm]
"""Terms about the owners of the address."""
AddressGroup = Union[NetsTerm, ServiceTerm]
"""Terms about nets and services that contain the address; they are part of an identity."""
Term = Union[OwnerTerm, AddressGroup]


@dataclass(frozen=True, slots=True)
class AddressMatch:
    """True if all terms of ``positive`` are true, none of ``negative``, and the address is of ``family`` (0: any)."""

    family: int = 0
    positive: frozenset[Term] = frozenset()
    negative: frozenset[Term] = frozenset()

    @property
    def is_family_alone(self) -> bool:
        """Whether the match depends only on the address's family."""
        return not self.positive and not self.negative


ANYONE = AddressMatch()
