# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of a WATCH for a real API server: memory for each WATCH, and processor time for each event.

    KUBE_APISERVER=FILE ETCD=FILE python -m tests.apiserver.watch_cost [--watches 250,1000] [--events 100]

Each WATCH has its own TLS connection, as with agents. The object has the size of a pod. The figures are differences to
the same server without a WATCH, in processor time, so they are also valid on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from server import TOKEN, Server

OBJECT_BYTES = 4000
MAPS = "/api/v1/namespaces/default/configmaps"
SETTLE_S = 3.0


class Watchers:
    """Open WATCHes. All data is read and discarded."""

    def __init__(self, server: Server) -> None:
        self._port = server.port
        self._context = ssl.create_default_context(cafile=str(server._authority))
        self._epoll = select.epoll()
        self._sockets: dict[int, ssl.SSLSocket] = {}
        self.received_bytes = 0
        threading.Thread(target=self._drain, daemon=True).start()

    def open(self, count: int) -> None:
        """Open WATCHes until there are ``count``."""
        query = "watch=1&allowWatchBookmarks=true&timeoutSeconds=3600"
        head = f"GET /api/v1/configmaps?{query} HTTP/1.1\r\nHost: server\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        while len(self._sockets) < count:
            plain = socket.create_connection(("127.0.0.1", self._port))
            one = self._context.wrap_socket(plain, server_hostname="127.0.0.1")
            one.sendall(head.encode("ascii"))
            one.recv(1)
            one.settimeout(0)
            self._sockets[one.fileno()] = one
            self._epoll.register(one.fileno(), select.EPOLLIN)

    def _drain(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll(0.5):
                try:
                    while data := self._sockets[descriptor].recv(1 << 16):
                        self.received_bytes += len(data)
                except ssl.SSLWantReadError:  # noqa: PERF203 - all of it is read
                    continue


def processor_s(pid: int) -> float:
    """The processor time that a process has taken, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kb(pid: int) -> float:
    """The resident memory of a process, in kilobytes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1000


def event_ms(server: Server, pid: int, events: int) -> float:
    """The server's processor time for a write and its events, in milliseconds, less the time that it takes at rest."""
    time.sleep(SETTLE_S)
    before, began = processor_s(pid), time.monotonic()
    for number in range(events):
        text = {"text": "x" * OBJECT_BYTES, "number": str(number)}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": text}
        answer = server.request("PUT", f"{MAPS}/one", body)
        if answer.status != 200:
            raise AssertionError(answer.message)
    time.sleep(SETTLE_S)
    spent, elapsed = processor_s(pid) - before, time.monotonic() - began
    before = processor_s(pid)
    time.sleep(elapsed)
    return 1e3 * (spent - (processor_s(pid) - before)) / events


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--watches", default="250,1000", help="numbers of WATCHes, ascending")
    parser.add_argument("--events", type=int, default=100)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as home:
        server = Server(Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"]), Path(home))
        try:
            pid = server._processes[1].pid
            created = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one", "namespace": "default"}}
            if server.create(created).status != 201:
                raise AssertionError("the object cannot be made")
            watchers, alone_ms, before_kb = Watchers(server), event_ms(server, pid, options.events), resident_kb(pid)
            for count in map(int, options.watches.split(",")):
                watchers.open(count)
                time.sleep(SETTLE_S)
                kb = (resident_kb(pid) - before_kb) / count
                each_us = 1e3 * (event_ms(server, pid, options.events) - alone_ms) / count
                print(
                    f"{count} watches: {kb:.0f} kB and, for each event, {each_us:.0f} us of a processor, for each watch"
                )
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
