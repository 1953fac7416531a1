# SPDX-License-Identifier: Apache-2.0
"""Names of interfaces that container networks make of the pod's name. Makes no system call."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from netpol_ebpf.policy.types import EndpointKey

DERIVED_NAME = re.compile(r"(?:cali|eni|vlan|gke|azv)([0-9a-f]{11})")
"""Names of a pod's interface on the node that container networks make of the first 11 digits of the SHA-1 of ``namespace.name``
(Calico; AWS VPC CNI, with ``vlan`` for pods that have security groups; GKE; Azure CNI)."""
KEPT = 1 << 12
"""Hashes that are kept; arbitrary, more than a node has pods."""


def hash_in(name: str) -> str | None:
    """The hash in an interface's name; None where there is none."""
    match = DERIVED_NAME.fullmatch(name)
    return None if match is None else match[1]


@lru_cache(maxsize=KEPT)
def derived_hash(key: EndpointKey) -> str:
    """The hash in the names that are made of a pod's."""
    return hashlib.sha1(f"{key.namespace}.{key.name}".encode(), usedforsecurity=False).hexdigest()[:11]
