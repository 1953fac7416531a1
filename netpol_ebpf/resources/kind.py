# SPDX-License-Identifier: Apache-2.0
"""The description of a kind: how the loader parses and checks its objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from netpol_ebpf.resources.reader import Reader
from netpol_ebpf.resources.types import Meta, Resource


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of one API version.

    ``parse``: parses the fields other than metadata; None after an error, which it has recorded.
    ``check_name``: returns the fault of a name, or None.
    ``strict``: unknown fields, and labels that the API server would reject, are errors (for policies); otherwise they
    are ignored (for objects that a cluster wrote).
    ``is_stored``: the objects are in the form in which Calico stores them, with the v3 object's metadata in an
    annotation.
    """

    api_version: str
    kind: str
    namespaced: bool
    parse: Callable[[Reader, Meta], Resource | None]
    check_name: Callable[[str], str | None]
    strict: bool = True
    is_stored: bool = False
