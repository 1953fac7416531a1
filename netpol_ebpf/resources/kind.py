# SPDX-License-Identifier: Apache-2.0
"""The description of a kind by which the loader reads its objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from netpol_ebpf.resources.reader import Reader
from netpol_ebpf.resources.types import Meta, Resource


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of one API version.

    ``parse`` reads the object's own fields (metadata is read before) and may return None after it recorded an error;
    ``check_name`` returns what is wrong with a name, or None; ``strict``: unknown fields and labels that the API
    server would refuse are errors (policies), not ignored (objects that the cluster itself wrote); ``is_stored``: the form in which
    Calico stores the object, with other metadata than the object's own.
    """

    api_version: str
    kind: str
    namespaced: bool
    parse: Callable[[Reader, Meta], Resource | None]
    check_name: Callable[[str], str | None]
    strict: bool = True
    is_stored: bool = False
