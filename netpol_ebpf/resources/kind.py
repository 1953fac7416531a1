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

    ``parse``: parses the fields other than metadata.  If there is an error, it records the error and returns None.
    ``check_name``: returns the fault of a name, or None.
    ``strict``: True for policies: unknown fields, and labels that the API server would reject, are errors.  False for
    objects that a cluster wrote: such fields and labels are ignored.
    ``is_stored``: whether the objects are in the form in which Calico stores them (`calico_storage`).
    """

    api_version: str
    kind: str
    namespaced: bool
    parse: Callable[[Reader, Meta], Resource | None]
    check_name: Callable[[str], str | None]
    strict: bool = True
    is_stored: bool = False
