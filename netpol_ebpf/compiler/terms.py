# SPDX-License-Identifier: Apache-2.0
"""Conditions on one address as values: terms, and matches that combine terms.

Invariant: whether a term is true depends only on the *identity* of an address, that is, on the address's owners and on
the nets and services that contain the address.  Conditions on protocol and ports are in `netpol_ebpf.compiler.l4`.
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
    """True if an endpoint with the address declares this port of this protocol under ``name``.

    ``selector``: if not None, the selector must also match the labels of that endpoint.
    """

    selector: Selector | None
    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class ObjectTerm:
    """True if an endpoint or a node has the address."""


@dataclass(frozen=True, slots=True)
class NetsTerm:
    """True if one of the nets contains the address. No net contains another net, and no net is a default route."""

    nets: frozenset[IPNetwork]


@dataclass(frozen=True, slots=True)
class ServiceTerm:
    """True if the address is a backend of the service.

    ``protocol``, ``port``: if ``protocol`` is not 0, the address must be a backend with this protocol and this port.
    """

    namespace: str
    name: str
    protocol: int = 0
    port: int = 0


OwnerTerm = Union[SelectorTerm, NodeTerm, NamedPortTerm, ObjectTerm]
"""A term about the owners of the address."""
AddressGroup = Union[NetsTerm, ServiceTerm]
"""A term about nets or a service that contain the address. The address groups of an address are part of its identity.
"""
Term = Union[OwnerTerm, AddressGroup]


@dataclass(frozen=True, slots=True)
class AddressMatch:
    """True if all terms of ``positive`` are true and all terms of ``negative`` are false.

    ``family``: 4 or 6 if the address must be of this family; 0 if the family does not matter.
    """

    family: int = 0
    positive: frozenset[Term] = frozenset()
    negative: frozenset[Term] = frozenset()

    @property
    def is_family_alone(self) -> bool:
        """Whether the match depends only on the address's family."""
        return not self.positive and not self.negative


ANYONE = AddressMatch()
