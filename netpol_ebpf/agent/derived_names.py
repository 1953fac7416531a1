# SPDX-License-Identifier: Apache-2.0
"""Names of interfaces that container networks derive from the name of the pod. This module makes no system call."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from netpol_ebpf.policy.types import EndpointKey

DERIVED_NAME = re.compile(r"(?:cali|eni|vlan|gke|azv)([0-9a-f]{11})")
"""Matches names that container networks give to a pod's interface on the node: a prefix, and the first 11 hexadecimal
digits of SHA-1("namespace.name"). The networks are Calico, AWS VPC CNI (prefix ``vlan`` for pods with security groups),
GKE and Azure CNI."""
KEPT = 1 << 12
"""Number of hashes that are cached. The number is arbitrary, but larger than the number of pods on a node."""


def hash_in(name: str) -> str | None:
    """The hash at the end of a derived name; None if the name is not derived from a pod's."""
    match = DERIVED_NAME.fullmatch(name)
    return None if match is None else match[1]


@lru_cache(maxsize=KEPT)
def derived_hash(key: EndpointKey) -> str:
    """The hash that a name derived from this pod's name has at its end."""
    return hashlib.sha1(f"{key.namespace}.{key.name}".encode(), usedforsecurity=False).hexdigest()[:11]
