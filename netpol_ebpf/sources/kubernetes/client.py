# SPDX-License-Identifier: Apache-2.0
"""Requests to an API server: TLS, credentials, proxies, and connection errors.

Each request has its own connection. To keep connections open would save little, because a WATCH uses its connection for
minutes, and a stopping server or a load balancer may close an idle connection at any moment. Certificates and tokens
are read again for each request, so a rotated certificate or token is used from the next request on.

Invariant: an answer is complete, or the caller gets UnreachableError; a truncated body never looks complete.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from netpol_ebpf import __version__
from netpol_ebpf.errors import InvalidInputError, UnreachableError

CONNECT_S = 10.0
"""Time limit in seconds for a connection including its TLS handshake."""
READ_BYTES = 65536
MOST_BODY_BYTES = 256 << 20
"""Largest uncompressed size in bytes of one page or Status. A page of 500 objects, each of the largest size that etcd
accepts, would be 750 MB, but no cluster has so many large objects."""
MOST_LINE_BYTES = 16 << 20
"""Largest size of one event in bytes. An event contains one object, which has at most 1.5 MB in etcd."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
"""Settings of TCP keepalive: seconds of silence, seconds between probes, number of probes. With them a vanished server
is noticed after a minute."""

USER_AGENT = f"netpol-ebpf/{__version__}"
"""The User-Agent header. It must not be that of a browser or of curl, to which the server sends indented JSON of twice
the size."""
_JSON = "application/json"
_METADATA = f"application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,{_JSON}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials of a request: HTTP headers, and a client certificate with its key (PEM); b"" if there is none."""

    headers: Mapping[str, str] = field(default_factory=dict)
    certificate: bytes = b""
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The address of an API server, and how to connect to it.

    ``authority``: reads the certificate authorities (PEM); b"": those of the system. ``credentials``: reads the
    credentials; its argument is the credentials that it returned before and the server rejected, or None. Both may
    raise OSError or InvalidInputError. ``proxy``: the URL of an HTTP proxy, or "". ``server_name``: the name in the
    server's certificate, "" if it is the host's.
    """

    server: str
    authority: Callable[[], bytes] = bytes
    credentials: Callable[[Credentials | None], Credentials] = lambda _refused: Credentials()
    proxy: str = ""
    server_name: str = ""
    is_insecure: bool = False


class HttpAnswer:
    """An answer whose status line and headers have been read. The caller must call `close`."""

    def __init__(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, sock: socket.socket
    ) -> None:
        self.status = response.status
        self._response = response
        self._connection = connection
        self._socket = sock
        self._peer = f"{connection.host}:{connection.port}"

    @property
    def retry_after_s(self) -> float | None:
        """Seconds in the Retry-After header; None without the header. The API server never sends a date there."""
        text = self._response.getheader("Retry-After", "")
        return float(text) if text.isascii() and text.isdigit() else None

    @property
    def server_time_s(self) -> float | None:
        """The time of the server when it answered, in seconds since 1970; None without a Date header."""
        text = self._response.getheader("Date", "")
        try:
            return parsedate_to_datetime(text).timestamp()
        except (TypeError, ValueError):  # Python 3.10 raises the first for a text that is no date
            return None

    def body(self) -> bytes:
        """The whole body, uncompressed. Raises UnreachableError if it is truncated or too large."""
        packed = self._response.getheader("Content-Encoding", "") == "gzip"
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 16) if packed else None
        parts: list[bytes] = []
        size_bytes = 0
        try:
            while part := self._response.read(READ_BYTES):
                parts.append(part if unpack is None else unpack.decompress(part))
                size_bytes += len(parts[-1])
                if size_bytes > MOST_BODY_BYTES:
                    raise UnreachableError(f"{self._peer} sent more than {MOST_BODY_BYTES >> 20} MiB in one answer")
        except (OSError, http.client.HTTPException, zlib.error) as error:
            raise _cut(self._peer, error) from error
        if self._response.length:  # http.client reports no error if the connection ends before a body of known length
            raise _cut(self._peer, "the connection was closed")
        if unpack is not None and not unpack.eof:
            raise _cut(self._peer, "the compressed body has no end")
        return b"".join(parts)

    def lines(self) -> Iterator[bytes]:
        """The lines of a WATCH, without empty ones, until the stream ends cleanly.

        Raises UnreachableError if the stream is truncated or a line is too large.
        """
        rest: list[bytes] = []
        rest_bytes = 0
        while True:
            try:
                part = self._response.read1(READ_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _cut(self._peer, error) from error
            if not part:
                break
            first, *others = part.split(b"\n")
            rest.append(first)
            rest_bytes += len(first)
            if rest_bytes > MOST_LINE_BYTES:
                raise UnreachableError(f"{self._peer} sent an event of more than {MOST_LINE_BYTES >> 20} MiB")
            if others:
                *whole, last = (b"".join(rest), *others)
                yield from filter(None, whole)
                rest, rest_bytes = [last], len(last)
        if not self._response.isclosed() or not self._response.chunked or any(rest):
            raise _cut(self._peer, "the connection was closed")

    def abort(self) -> None:
        """End the connection, from another thread. The reading thread then gets an error."""
        with suppress(OSError):  # it has ended
            socket.socket.shutdown(
                self._socket, socket.SHUT_RDWR
            )  # the TCP socket: another thread must not change the TLS object

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()


def _cut(peer: str, why: object) -> UnreachableError:
    return UnreachableError(f"the answer of {peer} was cut ({why})", hint="")


class Client:
    """Makes requests to one API server. Threads may share it."""

    def __init__(self, cluster: Cluster) -> None:
        parts = _split(cluster.server, ("https", "http"), "server")
        if parts.username is not None:  # rejected, because errors and `status` show the server's URL
            raise InvalidInputError(
                f"the server {parts.netloc.rpartition('@')[2]} has credentials in its URL, which do not count",
                hint="Give the credentials in the user entry of the kubeconfig.",
            )
        self.cluster = cluster
        self.peer = parts.netloc
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._is_tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._proxy = _split(cluster.proxy, ("http",), "proxy") if cluster.proxy else None
        self._refused: Credentials | None = None

    def get(self, target: str, *, head_s: float, idle_s: float, metadata_only: bool = False) -> HttpAnswer:
        """Send a GET request; returns when the head of the answer has been read.

        ``target``: path and query. ``head_s``: time limit in seconds for the head. ``idle_s``: longest silence in
        seconds in the body. ``metadata_only``: ask for the metadata of one object. Raises UnreachableError, also if
        credentials or certificates cannot be read now.
        """
        accept = _METADATA if metadata_only else _JSON
        return self._begin("GET", target, None, {"Accept": accept}, head_s=head_s, idle_s=idle_s)

    def send(
        self, method: str, target: str, body: bytes, *, head_s: float, idle_s: float, content_type: str = _JSON
    ) -> HttpAnswer:
        """Send a request that writes; arguments and errors are those of `get`.

        After an error it is not known whether the server has executed the request.
        """
        headers = {"Accept": _JSON, "Content-Type": content_type}
        return self._begin(method, target, body, headers, head_s=head_s, idle_s=idle_s)

    def _begin(
        self, method: str, target: str, body: bytes | None, own: Mapping[str, str], *, head_s: float, idle_s: float
    ) -> HttpAnswer:
        connection = self._connection()
        try:
            credentials = self._credentials()
            self._connect(connection, credentials)
            headers = {**credentials.headers, **own, "Accept-Encoding": "gzip", "User-Agent": USER_AGENT}
            sock: socket.socket = connection.sock
            sock.settimeout(head_s)
            connection.request(method, self._prefix + target, body, headers)
            response = connection.getresponse()
            sock.settimeout(idle_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise UnreachableError(f"{self.peer} cannot be reached ({_reason(error)})", hint="") from error
        except BaseException:
            connection.close()
            raise
        if response.status == http.HTTPStatus.UNAUTHORIZED:
            self._refused = credentials
        return HttpAnswer(response, connection, sock)

    def _connection(self) -> http.client.HTTPConnection:
        if self._proxy is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        connection = http.client.HTTPConnection(self._proxy.hostname or "", self._proxy.port or 80, timeout=CONNECT_S)
        connection.set_tunnel(self._host, self._port, headers=_proxy_headers(self._proxy))
        return connection

    def _credentials(self) -> Credentials:
        refused, self._refused = self._refused, None
        try:
            return self.cluster.credentials(refused)
        except (OSError, InvalidInputError) as error:
            raise UnreachableError(f"the credentials for {self.peer} cannot be read ({error})", hint="") from error

    def _connect(self, connection: http.client.HTTPConnection, credentials: Credentials) -> None:
        connection.connect()
        _keep_alive(connection.sock)
        if self._is_tls:
            context = self._context(credentials)
            name = self.cluster.server_name or self._host
            connection.sock = context.wrap_socket(connection.sock, server_hostname=name)

    def _context(self, credentials: Credentials) -> ssl.SSLContext:
        try:
            authority = self.cluster.authority()
            context = ssl.create_default_context(cadata=authority.decode("ascii") if authority else None)
            # Without this, Python 3.13 rejects certificates without key identifiers, which Go, and so kubectl, accepts.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if self.cluster.is_insecure:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if credentials.certificate:
                _load_certificate(context, credentials)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise UnreachableError(f"the certificates for {self.peer} cannot be read ({error})", hint="") from error
        return context


def _load_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Load a client certificate and its key into a TLS context.

    Python's `ssl` reads certificates and keys only from files. The file is a memfd, which has no name, so the key is
    never on a disk.
    """
    descriptor = os.memfd_create("client-certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.certificate + b"\n" + credentials.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _split(url: str, schemes: tuple[str, ...], what: str) -> SplitResult:
    """Split a URL. No error shows what may be a password in it."""
    shown = f"...@{url.rpartition('@')[2]}" if "@" in url else url
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError if it is no number
    except ValueError as error:
        if shown != url:  # the ValueError quotes a part of the URL
            raise InvalidInputError(f"the {what} {shown!r} is no URL") from None
        raise InvalidInputError(f"the {what} {url!r} is no URL ({error})") from error
    if parts.scheme not in schemes or not parts.hostname or port == 0:
        raise InvalidInputError(f"the {what} {shown!r} must be a URL that begins with {' or '.join(schemes)}")
    return parts


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    text = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(text.encode()).decode('ascii')}"}


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# --- in a pod -------------------------------------------------------------------------------------------------------------------

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def in_cluster(directory: Path = SERVICE_ACCOUNT, environment: Mapping[str, str] = os.environ) -> Cluster:
    """The API server of the cluster in which this pod runs. Its token is read for each request.

    Raises InvalidInputError outside a pod.
    """
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port or not (directory / "token").exists():
        raise InvalidInputError(
            "this is no pod with a service account (KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT and a token)",
            hint="Name a kubeconfig (--kubeconfig; for netpolctl also KUBECONFIG or ~/.kube/config), or run it in a pod with "
            "automountServiceAccountToken.",
        )
    return Cluster(
        f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        authority=(directory / "ca.crt").read_bytes,
        credentials=lambda _refused: bearer(read_token(directory / "token")),
    )


def read_token(path: Path) -> str:
    """Read a token from its file. Raises OSError; raises InvalidInputError if the file is empty."""
    token = path.read_text(encoding="ascii").strip()
    if not token:
        raise InvalidInputError(f"the token file {path} is empty")
    return token


def bearer(token: str) -> Credentials:
    """The credentials that a bearer token makes. Raises InvalidInputError if the token is not valid in a header."""
    if not token.isascii() or not token.isprintable():
        raise InvalidInputError("a token holds characters that no token has")
    return Credentials({"Authorization": f"Bearer {token}"})
