# SPDX-License-Identifier: Apache-2.0
"""The saved state of a cluster in a file, for a node that restarts while the API server is unreachable.

The file has one line for each object: JSON with the fields that the agent reads. Its last line is a hash. Saved objects
are parsed like the server's objects, so after an upgrade the new agent validates them.

Invariant: the file contains one state in which every kind was listed, or does not exist. It is replaced atomically:
written and synced to disk under a temporary name, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from netpol_ebpf.resources.manifest_files import read_regular
from netpol_ebpf.sources.kubernetes.cache import SavedKind, SavedObject
from netpol_ebpf.sources.kubernetes.decoding import MalformedError, WatchedKind, decode_fields, name_of

FORMAT = 1
_ORPHAN, _OBJECT = b"o", b"."


@dataclass(frozen=True, slots=True)
class SavedState:
    """The saved state.

    ``saved``: when it was written, in UTC. ``kinds``: its kinds by (apiVersion, kind), also those that this version
    does not watch.
    """

    saved: str
    kinds: Mapping[tuple[str, str], SavedKind]

    def of(self, kinds: tuple[WatchedKind, ...]) -> dict[WatchedKind, SavedKind]:
        """The saved objects of ``kinds``, without kinds that the saved state lacks."""
        found = {kind: self.kinds.get((kind.api_version, kind.kind)) for kind in kinds}
        return {kind: one for kind, one in found.items() if one is not None}


def load_state(path: Path) -> SavedState | None:
    """Load the saved state; None if the file does not exist.

    Raises OSError. Raises MalformedError if the file is damaged or has another format.
    """
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return None
    body, _, end = raw.removesuffix(b"\n").rpartition(b"\n")
    if end != _digest(body + b"\n"):
        raise MalformedError("its end does not fit its content")
    try:
        return _parse(iter(body.split(b"\n")))
    except (ValueError, LookupError, TypeError, StopIteration, RecursionError) as error:
        raise MalformedError(f"it is not of this format ({error})") from error


def _parse(lines: Iterator[bytes]) -> SavedState:
    head = json.loads(next(lines))
    if head["format"] != FORMAT:
        raise MalformedError(f"it has the format {head['format']}, and this version reads {FORMAT}")
    kinds: dict[tuple[str, str], SavedKind] = {}
    for line in lines:
        part = json.loads(line)
        objects = [SavedObject(one[1:], one[:1] == _ORPHAN) for one in (next(lines) for _ in range(part["objects"]))]
        for one in objects:
            name_of(decode_fields(one.fields), "a saved object")
        if not isinstance(part["definition"], str):
            raise MalformedError("the uid of a definition is no text")
        kinds[part["apiVersion"], part["kind"]] = SavedKind(part["definition"], objects)
    return SavedState(head["saved"], kinds)


def store_state(path: Path, kinds: Mapping[WatchedKind, SavedKind]) -> None:
    """Replace the saved state atomically. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    saved = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = b"".join(_lines(saved, kinds))
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
        file.write(body)
        file.write(_digest(body) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _lines(saved: str, kinds: Mapping[WatchedKind, SavedKind]) -> Iterator[bytes]:
    yield json.dumps({"format": FORMAT, "saved": saved}).encode() + b"\n"
    for kind, one in kinds.items():
        head = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "definition": one.definition_uid,
            "objects": len(one.objects),
        }
        yield json.dumps(head).encode() + b"\n"
        for item in one.objects:
            yield (_ORPHAN if item.is_orphan else _OBJECT) + item.fields + b"\n"


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
