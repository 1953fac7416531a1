# SPDX-License-Identifier: Apache-2.0
"""A transport without a network: recorded answers of a kube-apiserver (tests/data/apiserver), and made-up ones."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.errors import UnreachableError

pytest.importorskip("msgspec", reason="the extra [kubernetes] is not installed")

from netpol_ebpf.sources.kubernetes.cache import Cache  # noqa: E402
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind  # noqa: E402
from netpol_ebpf.sources.kubernetes.watching import KindWatcher  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "data" / "apiserver"
CLEAN_ENDS = ("final chunk", "content-length")

PODS = next(kind for kind in KINDS if kind.kind == "Pod")
TIERS = next(kind for kind in KINDS if kind.kind == "Tier")
NAMESPACES = next(kind for kind in KINDS if kind.kind == "Namespace")


def exchanges(trace: str) -> list[dict[str, Any]]:
    """All exchanges of a trace."""
    found: list[dict[str, Any]] = json.loads((DATA / f"{trace}.json").read_text(encoding="utf-8"))["exchanges"]
    return found


@dataclass
class Clock:
    """A clock that only the test moves, in seconds."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Reply:
    """One answer: chunks, each at a time in seconds after the request, and whether the connection is cut after them."""

    status: int = 200
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    is_cut: bool = False
    retry_after_s: float | None = None
    clock: Clock | None = None
    end_s: float | None = None
    meanwhile: Callable[[], None] = lambda: None  # called before the end, while the reader reads

    def body(self) -> bytes:
        if self.is_cut:
            raise UnreachableError("the connection was closed in the middle of an answer")
        return b"".join(chunk for _, chunk in self.chunks)

    def lines(self) -> Iterator[bytes]:
        began_s, rest = (self.clock.now_s if self.clock else 0.0), b""
        for at_s, chunk in self.chunks:
            self._pass(began_s, at_s)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        self.meanwhile()
        if self.end_s is not None:
            self._pass(began_s, self.end_s)
        if self.is_cut:
            raise UnreachableError("the connection was closed in the middle of an answer")

    def _pass(self, began_s: float, at_s: float) -> None:
        if self.clock is not None:
            self.clock.now_s = began_s + at_s

    def abort(self) -> None:
        self.is_cut = True

    def close(self) -> None:
        pass


def recorded(trace: str, number: int) -> Reply:
    """The recorded answer of one exchange."""
    one = exchanges(trace)[number]
    head = one["response_head"].split("\r\n")
    fields = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:])}
    if "response_chunks_base64" in one:
        whole = b"".join(base64.b64decode(text) for _, text in one["response_chunks_base64"])
        chunks = [(0.0, gzip.decompress(whole) if fields.get("content-encoding") == "gzip" else whole)]
    else:
        chunks = [(at_s, text.encode()) for at_s, text in one["response_chunks"]]
    retry_after = fields.get("retry-after")
    return Reply(
        int(head[0].split()[1]),
        chunks,
        is_cut=one["end"] not in CLEAN_ENDS,
        retry_after_s=None if retry_after is None else float(retry_after),
    )


def stream(*events: tuple[str, dict[str, Any]], end_s: float | None = None, is_cut: bool = False) -> Reply:
    """A WATCH with these events."""
    lines = [json.dumps({"type": kind, "object": obj}).encode() + b"\n" for kind, obj in events]
    return Reply(chunks=[(0.0, line) for line in lines], end_s=end_s, is_cut=is_cut)


def page(*objects: dict[str, Any], version: str, more: str = "") -> Reply:
    """An answer to a LIST."""
    metadata = {"resourceVersion": version} | ({"continue": more} if more else {})
    return Reply(chunks=[(0.0, json.dumps({"metadata": metadata, "items": list(objects)}).encode())])


def mark(version: str, *, ends_list: bool = False) -> tuple[str, dict[str, Any]]:
    """A BOOKMARK event."""
    annotations = {"annotations": {"k8s.io/initial-events-end": "true"}} if ends_list else {}
    return "BOOKMARK", {"metadata": {"resourceVersion": version, **annotations}}


def failure(code: int, message: str = "no", retry_after_s: float | None = None) -> Reply:
    """An error answer with a Status."""
    body = json.dumps({"kind": "Status", "message": message, "reason": "Made", "code": code}).encode()
    return Reply(code, [(0.0, body)], retry_after_s=retry_after_s)


def tier(name: str, version: str = "5", **spec: Any) -> dict[str, Any]:
    """A Tier as the server has it."""
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "Tier",
        "metadata": {"name": name, "resourceVersion": version, "uid": f"uid-{name}"},
        "spec": {"order": 10, **spec},
    }


def pod(
    name: str, version: str = "5", *, address: str = "10.0.0.1", namespace: str = "prod", **labels: str
) -> dict[str, Any]:
    """A Pod as the server has it in a list."""
    return {
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": version, "labels": labels},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]},
    }


def definition(uid: str = "d1", *, is_ending: bool = False) -> Reply:
    """A CustomResourceDefinition."""
    metadata = {"uid": uid} | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if is_ending else {})
    return Reply(chunks=[(0.0, json.dumps({"metadata": metadata}).encode())])


@dataclass
class Script:
    """A transport that answers from two lists: for the kind, and for its definition (whose last answer is repeated)."""

    clock: Clock
    replies: list[Reply | Exception] = field(default_factory=list)
    definitions: list[Reply | Exception] = field(default_factory=lambda: [definition()])
    targets: list[str] = field(default_factory=list)

    def get(self, target: str, *, head_s: float, idle_s: float, metadata_only: bool = False) -> Reply:
        del head_s, idle_s
        if "/customresourcedefinitions/" in target:
            assert metadata_only
            reply = self.definitions[0] if len(self.definitions) == 1 else self.definitions.pop(0)
        else:
            assert not metadata_only  # a list would be of another type then, and a server answers 406
            self.targets.append(target)
            reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        reply.clock = self.clock
        return reply


class Bench:
    """A watcher of one kind that reads a script, and the cache that the watcher fills."""

    def __init__(self, kind: WatchedKind, *replies: Reply | Exception) -> None:
        self.clock = Clock()
        self.script = Script(self.clock, list(replies))
        self.cache = Cache((kind,))
        self.store = self.cache.stores[kind]
        self.watcher = KindWatcher(kind, self.script, self.store, lambda: 60.0, self.clock, lambda: 0.5)

    def steps(self, count: int = 1) -> float:
        """Make steps, with the pauses that they request. Returns the last requested pause."""
        delay_s = 0.0
        for _ in range(count):
            self.clock.now_s += delay_s
            delay_s = self.watcher.step()
        return delay_s

    def names(self) -> list[str]:
        """The names of the known objects."""
        return sorted(name.name for name in self.store.entries)

    def slugs(self) -> list[str]:
        """The slugs of the kind's problems."""
        return [problem.slug for problem in self.store.problems()]
