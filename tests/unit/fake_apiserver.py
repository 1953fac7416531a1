# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on a real socket. The test determines the bytes that it sends, and how a connection ends."""

from __future__ import annotations

import gzip
import json
import queue
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from apiserver_traces import Reply

MOST_HEAD_BYTES = 65536
Feed = queue.Queue["bytes | None"]


def write_kubeconfig(path: Path, url: str) -> Path:
    """Write a kubeconfig whose only context is the server at a URL, without credentials."""
    path.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": ""}}],
    }))  # fmt: skip
    return path


@dataclass
class Request:
    """A request. ``target``: with its query. ``headers``: by lower-case name."""

    target: str
    headers: dict[str, str]
    certificate: bytes | None = None
    method: str = "GET"
    body: bytes = b""


@dataclass
class Wire:
    """A `Reply` in the form in which it is sent.

    ``end``: "clean"; "cut" (closed without the final chunk); "reset"; "hold" (open and silent until the server is
    closed); "feed" (open; sends what is put into ``feed``, until that is None). ``length``: send Content-Length, and no
    chunks.
    """

    reply: Reply
    end: str = "clean"
    length: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    packs: bool = False
    has_no_head: bool = False
    feed: Feed = field(default_factory=queue.Queue)


class FakeServer:
    """A server at a port of its own. ``answer``: makes a `Wire` for a `Request`. A context manager."""

    def __init__(self, answer: Callable[[Request], Wire], context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._answer = answer
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.requests: list[Request] = []
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        return f"{'http' if self._context is None else 'https'}://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:  # noqa: PYI034 - typing.Self is of 3.11
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with suppress(OSError):  # a client that disconnects, or rejects the certificate
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            request = self._read(connection)
            if request is not None:
                self.requests.append(request)
                self._write(connection, self._answer(request))
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _read(self, connection: socket.socket) -> Request | None:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < MOST_HEAD_BYTES:
            part = connection.recv(4096)
            if not part:
                return None
            head += part
        head, _, body = head.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        certificate = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
        while len(body) < int(headers.get("content-length", "0")):
            body += connection.recv(65536)
        method, target, _ = first.split()
        return Request(target, headers, certificate, method, body)

    def _write(self, connection: socket.socket, wire: Wire) -> None:
        if wire.has_no_head:
            self._closed.wait(10)
            return
        reply = wire.reply
        parts = [chunk for _, chunk in reply.chunks]
        headers = {"Content-Type": "application/json", **wire.headers}
        if reply.retry_after_s is not None:
            headers["Retry-After"] = str(int(reply.retry_after_s))
        if wire.packs:
            headers["Content-Encoding"] = "gzip"
            parts = [gzip.compress(b"".join(parts))]
        if wire.length:
            headers["Content-Length"] = str(sum(map(len, parts)) + (1 if wire.end == "cut" else 0))
        else:
            headers["Transfer-Encoding"] = "chunked"
        head = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        connection.sendall(f"HTTP/1.1 {reply.status} Made\r\n{head}\r\n".encode())
        for part in parts:
            connection.sendall(part if wire.length else b"%x\r\n%s\r\n" % (len(part), part))
        if wire.end == "feed":
            self._send_feed(connection, wire.feed)
        if wire.end in ("clean", "feed") and not wire.length:
            connection.sendall(b"0\r\n\r\n")
        elif wire.end == "hold":
            self._closed.wait(10)
        elif wire.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _send_feed(self, connection: socket.socket, feed: Feed) -> None:
        while not self._closed.is_set():
            with suppress(queue.Empty):
                part = feed.get(timeout=0.05)
                if part is None:
                    return
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))


@dataclass(frozen=True)
class Certificates:
    """A certificate authority, a certificate of 127.0.0.1, and one of a client, made for one test run."""

    directory: Path

    def context(self, *, asks: bool = False) -> ssl.SSLContext:
        """The TLS context of the server. ``asks``: it requires a client certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / "server.crt", self.directory / "server.key")
        if asks:
            context.load_verify_locations(self.directory / "ca.crt")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


def make_certificates(directory: Path) -> Certificates:
    """Make the certificates with openssl."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    extensions = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", "-x509", *new, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt", *extensions)
    for name, extension in (
        ("server", "subjectAltName=IP:127.0.0.1,DNS:named.test"),
        ("client", "extendedKeyUsage=clientAuth"),
    ):
        openssl("req", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (directory / f"{name}.ext").write_text(extension)
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.crt")
    return Certificates(directory)
