# SPDX-License-Identifier: Apache-2.0
"""Requests over real sockets: bodies and streams, whole and cut; TLS, credentials, proxies."""

from __future__ import annotations

import gzip
import json
import shutil
import ssl
import threading
from pathlib import Path

import pytest
from apiserver_traces import DATA, PODS, Reply, exchanges, recorded
from fake_apiserver import Certificates, FakeServer, Wire, make_certificates

from netpol_ebpf.errors import InvalidInputError, UnreachableError
from netpol_ebpf.sources.kubernetes import client as client_module
from netpol_ebpf.sources.kubernetes.client import (
    Client,
    Cluster,
    Credentials,
    HttpAnswer,
    bearer,
    in_cluster,
    read_token,
)

BODY = b'{"items": [], "metadata": {"resourceVersion": "1"}}'


def get(client: Client, target: str = PODS.path, *, head_s: float = 5.0, idle_s: float = 5.0) -> HttpAnswer:
    """One request."""
    return client.get(target, head_s=head_s, idle_s=idle_s)


def body_of(wire: Wire) -> bytes:
    """The client's reading of an answer."""
    with FakeServer(lambda _request: wire) as server:
        answer = get(Client(Cluster(server.url)))
        try:
            return answer.body()
        finally:
            answer.close()


def lines_of(wire: Wire, idle_s: float = 5.0) -> tuple[list[bytes], str]:
    """The lines that a client reads, and how it ended: "" or the error."""
    lines = []
    with FakeServer(lambda _request: wire) as server:
        answer = get(Client(Cluster(server.url)), idle_s=idle_s)
        try:
            for line in answer.lines():
                lines.append(line)  # noqa: PERF402 - those before an error count
        except UnreachableError as error:
            return lines, error.message
        finally:
            answer.close()
    return lines, ""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made once."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    return make_certificates(tmp_path_factory.mktemp("certificates"))


# --- bodies and streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [False, True])
@pytest.mark.parametrize("packs", [False, True])
def test_body_is_read_in_every_form(*, length: bool, packs: bool) -> None:
    """L10, L11: chunks of any size or a length, packed or not."""
    chunks = [(0.0, BODY[at : at + 7]) for at in range(0, len(BODY), 7)]
    assert body_of(Wire(Reply(chunks=chunks), length=length, packs=packs)) == BODY


def test_recorded_gzip_is_unpacked() -> None:
    """L10: as the server packed it."""
    one = exchanges("list-gzip")[0]
    assert "gzip" in one["response_head"]
    whole = recorded("list-gzip", 0).body()
    wire = Wire(Reply(chunks=[(0.0, gzip.compress(whole))]), headers={"Content-Encoding": "gzip"})
    assert body_of(wire) == whole
    assert len(json.loads(whole)["items"]) == 25


@pytest.mark.parametrize(("end", "length"), [("cut", False), ("cut", True), ("reset", False)])
@pytest.mark.parametrize("packs", [False, True])
def test_cut_body_is_no_body(end: str, *, length: bool, packs: bool) -> None:
    """Half a list is not a shorter list."""
    with pytest.raises(UnreachableError, match="cut"):
        body_of(Wire(Reply(chunks=[(0.0, BODY)]), end=end, length=length, packs=packs))


def test_packed_body_without_its_end_is_no_body() -> None:
    """The HTTP body is whole, what was packed in it is not."""
    half = gzip.compress(BODY)[:-9]
    with pytest.raises(UnreachableError, match="cut"):
        body_of(Wire(Reply(chunks=[(0.0, half)]), headers={"Content-Encoding": "gzip"}))


def test_body_that_stops_is_no_body() -> None:
    """A server that hangs."""
    with FakeServer(lambda _request: Wire(Reply(chunks=[(0.0, BODY)]), end="hold")) as server:
        answer = get(Client(Cluster(server.url)), idle_s=0.3)
        with pytest.raises(UnreachableError):
            answer.body()
        answer.close()


def test_body_beyond_all_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked, a small answer may be a large one."""
    monkeypatch.setattr(client_module, "MOST_BODY_BYTES", 1 << 20)
    with pytest.raises(UnreachableError, match="more than 1 MiB"):
        body_of(Wire(Reply(chunks=[(0.0, bytes(3 << 20))]), packs=True))


def test_lines_are_cut_at_newlines() -> None:
    """W1: whatever the chunks."""
    whole = b"".join(chunk for _, chunk in recorded("watch-pod-life", 0).chunks)
    expected = [line for line in whole.split(b"\n") if line]
    for size in (1000, 70000, len(whole)):
        chunks = [(0.0, whole[at : at + size]) for at in range(0, len(whole), size)]
        assert lines_of(Wire(Reply(chunks=chunks))) == (expected, "")


def test_clean_end_and_cut_differ() -> None:
    """W5, W8: what came before counts in both."""
    assert lines_of(Wire(Reply(chunks=[(0.0, b"a\nb\n")]))) == ([b"a", b"b"], "")
    for end in ("cut", "reset"):
        lines, error = lines_of(Wire(Reply(chunks=[(0.0, b"a\nb\n")]), end=end))
        assert error
        assert end == "reset" or lines == [b"a", b"b"]


def test_end_in_a_line_is_a_cut() -> None:
    """Even where the body ends cleanly: a proxy may do that."""
    lines, error = lines_of(Wire(Reply(chunks=[(0.0, b'a\n{"type"')])))
    assert lines == [b"a"]
    assert "cut" in error


def test_silent_stream_ends() -> None:
    """No bookmark for several minutes."""
    lines, error = lines_of(Wire(Reply(chunks=[(0.0, b"a\n")]), end="hold"), idle_s=0.3)
    assert lines == [b"a"]
    assert error


def test_line_beyond_all_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without newlines fills no memory."""
    monkeypatch.setattr(client_module, "MOST_LINE_BYTES", 1 << 20)
    _, error = lines_of(Wire(Reply(chunks=[(0.0, b"x" * (3 << 20))])))
    assert "more than 1 MiB" in error


@pytest.mark.parametrize("is_tls", [False, True])
def test_stream_ends_from_another_thread(*, is_tls: bool, request: pytest.FixtureRequest) -> None:
    """The reader meets the end of the connection, not a closed file."""
    context, authority = None, b""
    if is_tls:
        made: Certificates = request.getfixturevalue("certificates")
        context, authority = made.context(), made.read("ca.crt")
    with FakeServer(lambda _request: Wire(Reply(chunks=[(0.0, b"a\n")]), end="hold"), context) as server:
        answer = get(Client(Cluster(server.url, authority=lambda: authority)), idle_s=60.0)
        ended: list[str] = []
        has_read = threading.Event()

        def read() -> None:
            try:
                for _ in answer.lines():
                    has_read.set()
            except UnreachableError as error:
                ended.append(error.message)

        thread = threading.Thread(target=read)
        thread.start()
        assert has_read.wait(10)
        answer.abort()
        thread.join(10)
        assert not thread.is_alive()
        assert len(ended) == 1
        answer.close()


def test_head_that_does_not_come_is_waited_for_no_longer() -> None:
    """A LIST that waits for etcd; the time is that of the head alone."""
    with (
        FakeServer(lambda _request: Wire(Reply(), has_no_head=True)) as server,
        pytest.raises(UnreachableError, match="does not answer in time"),
    ):
        get(Client(Cluster(server.url)), head_s=0.3)


def test_refused_connection_names_the_server() -> None:
    """Nobody listens."""
    with FakeServer(lambda _request: Wire(Reply())) as server:
        port = server.port
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port} cannot be reached"):
        get(Client(Cluster(f"http://127.0.0.1:{port}")))


def test_answer_that_is_no_http_is_unreachable() -> None:
    """Another service on the port."""
    listener = FakeServer(lambda _request: Wire(Reply()))
    listener._write = lambda connection, _wire: connection.sendall(b"SSH-2.0\r\n\r\n")  # type: ignore[method-assign]
    with listener as server, pytest.raises(UnreachableError):
        get(Client(Cluster(server.url)))


# --- what is asked for ------------------------------------------------------------------------------------------------------------


def test_request_says_who_asks_and_for_what() -> None:
    """L9: no User-Agent that gets indented JSON; L10: gzip is asked for; the path of the server is kept."""
    with FakeServer(lambda _request: Wire(Reply(chunks=[(0.0, BODY)]))) as server:
        client = Client(Cluster(f"{server.url}/clusters/a/"))
        get(client, "/api/v1/pods?limit=1").close()
        client.get("/x", head_s=5, idle_s=5, metadata_only=True).close()
        first, second = server.requests
    assert first.target == "/clusters/a/api/v1/pods?limit=1"
    assert first.headers["user-agent"].startswith("netpol-ebpf/")
    assert first.headers["accept-encoding"] == "gzip"
    assert first.headers["accept"] == "application/json"
    assert "PartialObjectMetadata" in second.headers["accept"]
    assert second.headers["accept"].endswith(",application/json")


def test_token_is_read_for_each_request(tmp_path: Path) -> None:
    """W17: a rotated one is in use with the next request; one that cannot be read is no reason to ask without."""
    (tmp_path / "token").write_text("one\n")
    cluster_of = lambda url: Cluster(url, credentials=lambda _refused: bearer(read_token(tmp_path / "token")))  # noqa: E731
    with FakeServer(lambda _request: Wire(Reply(chunks=[(0.0, BODY)]))) as server:
        client = Client(cluster_of(server.url))
        get(client).close()
        (tmp_path / "token").write_text("two")
        get(client).close()
        (tmp_path / "token").write_text("")
        with pytest.raises(UnreachableError, match="credentials"):
            get(client)
        (tmp_path / "token").unlink()
        with pytest.raises(UnreachableError, match="credentials"):
            get(client)
        assert [request.headers["authorization"] for request in server.requests] == ["Bearer one", "Bearer two"]


def test_refused_credentials_are_said_to_be() -> None:
    """401: the next request asks for others, the one after it does not."""
    given = [Credentials({"Authorization": str(number)}) for number in range(4)]
    refused: list[Credentials | None] = []

    def credentials(one: Credentials | None) -> Credentials:
        refused.append(one)
        return given[len(refused) - 1]

    statuses = iter([200, 401, 200, 200])
    with FakeServer(lambda _request: Wire(Reply(next(statuses)))) as server:
        client = Client(Cluster(server.url, credentials=credentials))
        for _ in range(4):
            get(client).close()
    assert refused == [None, None, given[1], None]


@pytest.mark.parametrize("token", ["a\nb", "\u00e9"])
def test_token_that_no_header_can_hold_is_refused(token: str) -> None:
    """Before it is sent."""
    with pytest.raises(InvalidInputError):
        bearer(token)


def test_retry_after_is_read() -> None:
    """Of the recorded answer, over the wire."""
    with FakeServer(lambda _request: Wire(recorded("overload-429", 0), length=True)) as server:
        answer = get(Client(Cluster(server.url)))
        assert (answer.status, answer.retry_after_s) == (429, 1.0)
        assert b"Too many requests" in answer.body()
        answer.close()


@pytest.mark.parametrize(
    "server", ["", "example.test", "ftp://a", "https://", "https://a:b", "https://a:99999", "https://[::1"]
)
def test_server_that_is_no_url_is_refused(server: str) -> None:
    """At once, with its text."""
    with pytest.raises(InvalidInputError, match="server"):
        Client(Cluster(server))


# --- TLS --------------------------------------------------------------------------------------------------------------------------


def serve(certificates: Certificates, *, asks: bool = False) -> FakeServer:
    """With TLS."""
    return FakeServer(lambda _request: Wire(Reply(chunks=[(0.0, BODY)])), certificates.context(asks=asks))


def test_certificate_is_checked(certificates: Certificates) -> None:
    """By the cluster's authority, not by the system's."""
    with serve(certificates) as server:
        answer = get(Client(Cluster(server.url, authority=lambda: certificates.read("ca.crt"))))
        assert answer.body() == BODY
        answer.close()
        with pytest.raises(UnreachableError, match="certificate is not accepted"):
            get(Client(Cluster(server.url)))
        get(Client(Cluster(server.url, is_insecure=True))).close()


def test_certificates_are_checked_as_by_kubectl(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the stricter rules that newer versions of Python begin with."""
    contexts = []
    create = ssl.create_default_context

    def strict(**options: str | None) -> ssl.SSLContext:
        contexts.append(create(**options))  # type: ignore[arg-type]
        contexts[-1].verify_flags |= ssl.VERIFY_X509_STRICT
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", strict)
    with serve(certificates) as server:
        get(Client(Cluster(server.url, authority=lambda: certificates.read("ca.crt")))).close()
    assert not contexts[0].verify_flags & ssl.VERIFY_X509_STRICT
    assert contexts[0].verify_mode is ssl.CERT_REQUIRED


def test_name_is_checked(certificates: Certificates) -> None:
    """The host's, or the one that is given for TLS."""
    with serve(certificates) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(UnreachableError, match="certificate is not accepted"):
            get(Client(Cluster(url, authority=lambda: certificates.read("ca.crt"))))
        named = Cluster(url, authority=lambda: certificates.read("ca.crt"), server_name="named.test")
        get(Client(named)).close()


def test_client_certificate_is_shown(certificates: Certificates) -> None:
    """From memory: its key needs no file."""
    shown = Credentials(certificate=certificates.read("client.crt"), key=certificates.read("client.key"))
    authority = lambda: certificates.read("ca.crt")  # noqa: E731
    with serve(certificates, asks=True) as server:
        get(Client(Cluster(server.url, authority=authority, credentials=lambda _refused: shown))).close()
        assert server.requests[0].certificate == ssl.PEM_cert_to_DER_cert(certificates.read("client.crt").decode())
        with pytest.raises(UnreachableError):
            get(Client(Cluster(server.url, authority=authority)))


@pytest.mark.parametrize("pem", [b"no certificate", b"\xff"])
def test_authority_that_is_none_is_unreachable(certificates: Certificates, pem: bytes) -> None:
    """A file that is being replaced may be better the next time."""
    with serve(certificates) as server, pytest.raises(UnreachableError, match="certificates"):
        get(Client(Cluster(server.url, authority=lambda: pem)))


# --- proxies and pods -------------------------------------------------------------------------------------------------------------


def test_proxy_is_asked_to_connect() -> None:
    """With what its URL has of credentials, and with the target's name: nothing is looked up here."""
    with FakeServer(lambda _request: Wire(Reply(407))) as proxy:
        cluster = Cluster("https://cluster.test:6443", proxy=f"http://user:p%40ss@127.0.0.1:{proxy.port}")
        with pytest.raises(UnreachableError, match="407"):
            get(Client(cluster))
        (request,) = proxy.requests
    assert request.target == "cluster.test:6443"
    assert request.headers["proxy-authorization"] == "Basic dXNlcjpwQHNz"


@pytest.mark.parametrize("proxy", ["socks5://a:1", "https://a", "a:1"])
def test_proxy_of_another_kind_is_refused(proxy: str) -> None:
    """Rather than going round it."""
    with pytest.raises(InvalidInputError, match="proxy"):
        Client(Cluster("https://a", proxy=proxy))


def test_pod_finds_its_cluster(tmp_path: Path) -> None:
    """By the environment and the mounted service account."""
    (tmp_path / "token").write_text("t1")
    (tmp_path / "ca.crt").write_bytes(b"ca")
    cluster = in_cluster(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"})
    assert cluster.server == "https://10.96.0.1:443"
    assert cluster.authority() == b"ca"
    (tmp_path / "token").write_text("t2")
    assert cluster.credentials(None).headers == {"Authorization": "Bearer t2"}
    six = in_cluster(tmp_path, {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"})
    assert Client(six).peer == "[fd00::1]:443"
    with pytest.raises(InvalidInputError, match="no pod"):
        in_cluster(tmp_path, {})
    with pytest.raises(InvalidInputError, match="no pod"):
        in_cluster(tmp_path / "none", {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"})


def test_no_trace_is_unread() -> None:
    """Every recorded file is of some test."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_kubernetes_*.py"))
    unread = [path.stem for path in DATA.glob("*.json") if path.stem not in tests and not path.stem.startswith("list-")]
    assert unread == []


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster("https://10.0.0.1", proxy="https://user:s3cret@proxy:3128"),
        Cluster("https://10.0.0.1", proxy="socks5://user:s3cret@proxy:3128"),
        Cluster("https://10.0.0.1", proxy="http://user:s3cret@proxy:port"),
        Cluster("https://10.0.0.1", proxy="user:s3cret@proxy:3128"),
        Cluster("https://10.0.0.1", proxy="http://user:s3c/ret@proxy:3128"),
        Cluster("https://user:s3cret@10.0.0.1"),
        Cluster("https://user:s3cret@10.0.0.1:port"),
        Cluster("https://s3cret@10.0.0.1"),
    ],
    ids=lambda one: one.proxy or one.server,
)
def test_no_error_shows_the_password_of_a_url(cluster: Cluster) -> None:
    """It is logged. A server with credentials in its URL is refused, since its URL is shown in `status`, too."""
    with pytest.raises(InvalidInputError) as refused:
        Client(cluster)
    assert "s3c" not in str(refused.value)
    assert "proxy" in str(refused.value) or "10.0.0.1" in str(refused.value)
