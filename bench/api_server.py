# SPDX-License-Identifier: Apache-2.0
"""A simulated API server: for one agent, it lists and watches generated objects of any number, over plain HTTP.

It answers the requests of `netpol_ebpf/sources/kubernetes`: streaming lists, WATCHes, single objects for probes, and
definitions. The objects are as large as those of a real cluster: most of a pod is managedFields, which the agent skips.

Invariant: a WATCH gets every change after its resourceVersion, or begins with a list. The server is not meant for other
clients: it keeps no history, so a WATCH continues from the present state.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from bench.cluster import Object
from netpol_ebpf.lab.probe import CLONE_NEWNET
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind

MANAGED_BYTES: Mapping[str, int] = {"Pod": 3000, "Node": 6000, "NetworkPolicy": 800, "Namespace": 400}
"""Bytes of managedFields by kind, which give an object about the size that it has in a real cluster."""
ABSENT = "crd.projectcalico.org/v1"
"""The API group that clusters without Calico do not have."""
HEAD_BYTES = 65536
SEND_BYTES = 1 << 16
END_OF_LIST = {"k8s.io/initial-events-end": "true"}


class SimulatedApi:
    """The server. A context manager. ``namespace``: the path of the network namespace in which it listens."""

    def __init__(self, objects: Iterable[Object], namespace: Path) -> None:
        self._kinds = {kind.path: kind for kind in KINDS if kind.api_version != ABSENT}
        self._paths = {(kind.api_version, kind.kind): kind.path for kind in self._kinds.values()}
        self._objects: dict[str, dict[tuple[str, str], bytes]] = {path: {} for path in self._kinds}
        self._watches: dict[str, list[socket.socket]] = {path: [] for path in self._kinds}
        self._lock = threading.Lock()
        self._namespace = namespace
        self._version = 1
        for one in objects:
            self._version += 1
            self._objects[self._path(one)][_name(one)] = _encode(one, self._version)

    @property
    def url(self) -> str:
        """The URL of the server, valid in its namespace."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> SimulatedApi:  # noqa: PYI034 - typing.Self comes with Python 3.11
        opening = threading.Thread(target=self._listen)
        opening.start()
        opening.join()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in (one for watches in self._watches.values() for one in watches):
                one.close()

    # --- changes -------------------------------------------------------------------------------------------------------

    def put(self, one: Object) -> None:
        """Add or replace an object. On return, the event is in the sockets of the WATCHes."""
        self._change(one, is_removal=False)

    def remove(self, one: Object) -> None:
        """Remove an object. On return, the event is in the sockets of the WATCHes."""
        self._change(one, is_removal=True)

    def mark(self) -> None:
        """Send a bookmark to each WATCH, as a real server does each minute."""
        with self._lock:
            for path in self._watches:
                self._send(path, _event("BOOKMARK", _bookmark(self._version, {})))

    def _change(self, one: Object, *, is_removal: bool) -> None:
        path, name = self._path(one), _name(one)
        with self._lock:
            self._version += 1
            encoded, known = _encode(one, self._version), self._objects[path]
            if is_removal:
                del known[name]
                kind = "DELETED"
            else:
                kind = "MODIFIED" if name in known else "ADDED"
                known[name] = encoded
            self._send(path, _event(kind, encoded))

    def _send(self, path: str, event: bytes) -> None:
        for one in list(self._watches[path]):
            try:
                one.sendall(event)
            except OSError:  # noqa: PERF203 - the agent has closed the connection
                self._watches[path].remove(one)
                one.close()

    def _path(self, one: Object) -> str:
        return self._paths[one["apiVersion"], one["kind"]]

    # --- answers -------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Open the server's socket.

        Runs in a thread that then ends, because this method moves its thread into the namespace.
        """
        descriptor = os.open(self._namespace, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)
        self._listener = socket.create_server(("127.0.0.1", 0))

    def _accept(self) -> None:
        with suppress(OSError):  # the server was closed
            while True:
                channel, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(channel,), daemon=True).start()

    def _serve(self, channel: socket.socket) -> None:
        """Answer one request. The connection of a WATCH stays open, and `put` and `remove` write to it from then on."""
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
                head += channel.recv(HEAD_BYTES)
            target = head.split(b" ", 2)[1].decode("ascii")
            path, _, query = target.partition("?")
            asked = parse_qs(query)
            kind = self._kinds.get(path)
            if kind is not None and "watch" in asked:
                self._watch(channel, kind, lists="sendInitialEvents" in asked)
                return
            if "/customresourcedefinitions/" in path:
                _answer(channel, 200, {"metadata": {"name": path.rpartition("/")[2], "uid": path}})
            elif kind is None:
                _answer(channel, 404, {"kind": "Status", "code": 404, "reason": "NotFound", "message": "no such kind"})
            else:
                with self._lock:
                    items = [json.loads(one) for one, _ in zip(self._objects[path].values(), range(1), strict=False)]
                    _answer(channel, 200, {"metadata": {"resourceVersion": str(self._version)}, "items": items})
        channel.close()

    def _watch(self, channel: socket.socket, kind: WatchedKind, *, lists: bool) -> None:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        with self._lock:
            present, version = list(self._objects[kind.path].values()) if lists else [], self._version
            if not present:
                self._join(channel, kind, version, lists=lists)
                return
        unsent = bytearray()
        for one in present:
            unsent += _event("ADDED", one)
            if len(unsent) >= SEND_BYTES:
                channel.sendall(unsent)
                unsent.clear()
        channel.sendall(unsent)
        with self._lock:
            self._join(channel, kind, version, lists=True)
            if self._version != version:
                raise AssertionError("the objects changed while an agent listed them, which this server cannot tell")

    def _join(self, channel: socket.socket, kind: WatchedKind, version: int, *, lists: bool) -> None:
        if lists:
            channel.sendall(_event("BOOKMARK", _bookmark(version, END_OF_LIST)))
        self._watches[kind.path].append(channel)


def _name(one: Object) -> tuple[str, str]:
    return one["metadata"].get("namespace", ""), one["metadata"]["name"]


def _encode(one: Object, version: int) -> bytes:
    """The JSON of an object as a server sends it, with its resourceVersion and managedFields."""
    managed = {
        "manager": "kubelet",
        "operation": "Update",
        "fieldsV1": {"f:made-up": "." * MANAGED_BYTES.get(one["kind"], 0)},
    }
    metadata = {**one["metadata"], "resourceVersion": str(version), "managedFields": [managed]}
    return json.dumps({**one, "metadata": metadata}, separators=(",", ":")).encode("ascii")


def _bookmark(version: int, annotations: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": str(version), "annotations": annotations}}).encode("ascii")


def _event(kind: str, encoded: bytes) -> bytes:
    """An event, encoded as a chunk of HTTP."""
    line = b'{"type":"%s","object":%s}\n' % (kind.encode("ascii"), encoded)
    return b"%x\r\n%s\r\n" % (len(line), line)


def _answer(channel: socket.socket, code: int, value: Any) -> None:
    body = json.dumps(value).encode("ascii")
    channel.sendall(
        b"HTTP/1.1 %d .\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (code, len(body), body)
    )
