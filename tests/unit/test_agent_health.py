# SPDX-License-Identifier: Apache-2.0
"""The health endpoint: real servers on loopback, an agent of canned answers, and clients of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from canned_state import full_state, rule

from netpol_ebpf.agent import health_server
from netpol_ebpf.agent.health import RETRY_S, Health, parse_health_address
from netpol_ebpf.agent.health_server import CONNECTIONS, LATE_S, STALL_S, HealthPage, HealthServer, error_page
from netpol_ebpf.agent.metrics import families
from netpol_ebpf.agent.report import readiness
from netpol_ebpf.errors import Location, Problem, UsageError
from netpol_ebpf.terminal import escaped

pytest.importorskip("prometheus_client", reason="the extra [metrics] is not installed")
DEADLINE_S = 60.0
READY = {"synced": "", "programmed": "", "fresh": ""}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true, and return its value."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(what)


@dataclass
class Endpoint:
    """A health endpoint with a clock that the test moves, and the agent's control socket."""

    health: Health
    asked: list[dict[str, Any]] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)
    now_s: float = 1000.0

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """The status and the body of an answer."""
        connection = http.client.HTTPConnection(*self.health.address, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.health.address, timeout=DEADLINE_S)

    def beat(self, **checks: str) -> None:
        """Send a beat, and wait until the server has it."""
        self.health.beat({**READY, **checks})
        wait_for(lambda: self.answers_with(checks), "the beat arrives")

    def answers_with(self, checks: dict[str, str]) -> bool:
        body = self.get("/readyz")[1]
        return "starting" not in body and all(escaped(why) in body for why in checks.values())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    """A running server. Its agent answers after `may_answer`."""
    path = tmp_path / "agent.sock"
    found = Endpoint(Health(("127.0.0.1", free_port()), path))
    found.health.clock = lambda: found.now_s
    found.may_answer.set()
    answer = [one.as_dict() for one in families(full_state(), [rule(1)])]

    def serve() -> None:
        while True:
            channel, _ = listener.accept()
            with channel, channel.makefile("rwb") as lines:
                line = lines.readline()
                if not line:
                    return
                found.asked.append(json.loads(line))
                assert found.may_answer.wait(DEADLINE_S)
                lines.write(json.dumps(answer).encode() + b"\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        found.health.open()
        try:
            yield found
        finally:
            found.may_answer.set()
            found.health.close()
            with socket.socket(socket.AF_UNIX) as end:
                end.connect(str(path))
            thread.join()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (None, None),
        ("127.0.0.1:9976", ("127.0.0.1", 9976)),
        ("[::1]:1", ("::1", 1)),
        ("192.0.2.7:65535", ("192.0.2.7", 65535)),
    ],
)
def test_addresses_of_the_node(text: str | None, address: tuple[str, int] | None) -> None:
    """One address and a port, or no endpoint."""
    assert parse_health_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":9976", "9976", "localhost:9976", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:+80", "::1:9976",
     "[127.0.0.1]:80", "0.0.0.0:9976", "[::]:9976", "224.0.0.1:80", "*:9976",
     "[::ffff:0.0.0.0]:9976", "[::ffff:127.0.0.1]:9976", "[::ffff:192.0.2.7]:9976"],
)  # fmt: skip
def test_anything_but_one_address_is_refused(text: str) -> None:
    """Names, wildcards and groups could be reachable from unintended places."""
    with pytest.raises(UsageError):
        parse_health_address(text)


# --- readiness --------------------------------------------------------------------------------------------------------


def agent(**changes: Any) -> Any:
    """A ready agent, with some changes."""
    report = {"source": "api", "synced": True, "waiting_for": [], "behind": [], **changes.pop("report", {})}
    whole = {
        "source": SimpleNamespace(report=lambda: (report,)), "is_started": True, "is_in_force": True, "keeps_enforcement": True,
        "rejected": SimpleNamespace(problem=None), "attachments": SimpleNamespace(problems={}.values()), **changes,
    }  # fmt: skip
    return SimpleNamespace(**whole)


PROBLEM = Problem(Location("a"), "", "no room in np_rule", slug="map-full")


@pytest.mark.parametrize(
    ("changes", "failed", "reason"),
    [
        ({"report": {"synced": False, "waiting_for": ["pods"]}}, "synced", "api: pods"),
        ({"report": {"behind": ["nodes: unreachable"]}}, "fresh", "api: nodes: unreachable"),
        ({"is_started": False}, "programmed", "an earlier agent"),
        ({"is_started": False, "keeps_enforcement": False}, "programmed", "nothing is in force"),
        ({"is_in_force": False}, "programmed", "closed"),
        ({"rejected": SimpleNamespace(problem=PROBLEM)}, "programmed", "no room in np_rule"),
        ({"attachments": SimpleNamespace(problems={5: PROBLEM}.values())}, "programmed", "no room in np_rule"),
    ],
)
def test_a_check_names_why_it_fails(changes: dict[str, Any], failed: str, reason: str) -> None:
    """Each state fails its own check, and no other."""
    checks = readiness(agent(**changes))
    assert [name for name, why in checks.items() if why] == [failed]
    assert reason in checks[failed]


def test_a_ready_agent_fails_no_check() -> None:
    """Every check has an entry in the table."""
    assert readiness(agent()) == READY


# --- answers ----------------------------------------------------------------------------------------------------------


def test_states_of_an_agent(endpoint: Endpoint) -> None:
    """Live from the start, ready with the first good beat. A failed check is named. HEAD has the same status."""
    assert endpoint.get("/livez") == (200, "[+]loop ok\n")
    status, body = endpoint.get("/readyz")
    assert (status, "the agent is starting" in body) == (503, True)
    endpoint.beat()
    assert endpoint.get("/readyz") == (200, "[+]synced ok\n[+]programmed ok\n[+]fresh ok\n[+]loop ok\n")
    endpoint.beat(fresh="cut off\x1b[2J\nfrom the server")
    status, body = endpoint.get("/readyz?verbose")
    assert status == 503
    assert "[-]fresh failed: cut off\\x1b[2J\\nfrom the server" in body.splitlines()
    assert endpoint.get("/readyz", "HEAD") == (503, "")
    assert endpoint.get("/livez", "HEAD") == (200, "")


def test_a_loop_that_stands_still_is_neither_live_nor_ready() -> None:
    """The server notices missing beats without the agent."""
    now_s = 0.0
    server = HealthServer(lambda: error_page(health_server.HTTPStatus.OK), clock=lambda: now_s)
    server.note_beat(json.dumps(READY).encode())
    for now_s, live, ready in (
        (LATE_S - 1, 200, 200),
        (LATE_S, 200, 503),
        (STALL_S - 1, 200, 503),
        (STALL_S, 503, 503),
    ):
        assert (server.livez().status, server.readyz().status) == (live, ready), now_s
    assert b"has not turned for" in server.livez().body
    server.note_beat(json.dumps(READY).encode())
    assert (server.livez().status, server.readyz().status) == (200, 200)


def test_metrics_are_the_agents(endpoint: Endpoint) -> None:
    """The page has the text of the agent's answer."""
    status, body = endpoint.get("/metrics")
    assert status == 200
    assert "netpol_generation 3.0" in body.splitlines()
    assert endpoint.asked == [{"op": "metrics"}]


def test_clients_that_scrape_at_once_make_one_question(endpoint: Endpoint) -> None:
    """The agent has one fork, however many clients ask while it answers. Probes are answered meanwhile."""
    endpoint.may_answer.clear()
    with ThreadPoolExecutor(8) as pool:
        scrapes = [pool.submit(endpoint.get, "/metrics") for _ in range(8)]
        wait_for(lambda: endpoint.asked, "a scrape reaches the agent")
        assert endpoint.get("/livez")[0] == 200
        assert not any(one.done() for one in scrapes)
        endpoint.may_answer.set()
        assert {one.result(DEADLINE_S)[0] for one in scrapes} == {200}
    assert len(endpoint.asked) < 8  # clients that came more than METRICS_AGE_S after the answer ask again


def test_metrics_of_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    """503 with the reason, and not an empty page, so that Prometheus sees a failed scrape."""
    page = health_server.load_metrics(tmp_path / "agent.sock")
    assert page.status == 503
    assert b"no agent answers" in page.body


def test_only_get_and_head(endpoint: Endpoint) -> None:
    """Other methods, other paths and other protocols get an answer with the reason."""
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "get"):
        assert endpoint.get("/livez", method)[0] == 405
    assert endpoint.get("/")[0] == 404
    assert endpoint.get("/livez/")[0] == 404
    for raw, answer in ((b"\x16\x03\x01\r\n\r\n", b"400"), (b"GET /livez\r\n\r\n", b"400"), (b"A" * 20000, b"431")):
        with endpoint.connect() as channel:
            channel.sendall(raw)
            assert channel.recv(100).split(b" ")[1] == answer


@contextlib.contextmanager
def served_here(monkeypatch: pytest.MonkeyPatch, **limits: float) -> Iterator[tuple[str, int]]:
    """The address of a server in a thread of this process, with other limits."""
    for name, value in limits.items():
        monkeypatch.setattr(health_server, name, value)
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(0)
    theirs.settimeout(0)
    server = HealthServer(lambda: HealthPage(health_server.HTTPStatus.OK, b""))
    thread = threading.Thread(target=lambda: asyncio.run(health_server.serve(server, listener, theirs)))
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        ours.close()  # as at the end of the agent
        thread.join(DEADLINE_S)
        theirs.close()
    assert not thread.is_alive()


def is_closed(channel: socket.socket) -> bool:
    """Whether the server has closed a connection on which it sent nothing."""
    channel.settimeout(0)
    try:
        return channel.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_slow_clients_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are too many silent connections, the oldest are closed, and a probe is answered at once."""
    with served_here(monkeypatch, REQUEST_S=1e6, CONNECTION_S=1e6) as address, contextlib.ExitStack() as stack:
        silent = []
        for number in range(CONNECTIONS + 5):
            silent.append(stack.enter_context(socket.create_connection(address, timeout=DEADLINE_S)))
            silent[-1].sendall(b"GET /livez HTTP/1.1\r\nHost:" if number % 2 else b"")
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=DEADLINE_S)) as probe:
            probe.request("GET", "/livez")
            assert probe.getresponse().status == 200
        wait_for(lambda: all(map(is_closed, silent[:6])), "the oldest connections are closed")
        assert not any(map(is_closed, silent[6:])), "the others are not"


def test_a_request_that_never_ends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then is also disconnected."""
    with served_here(monkeypatch, REQUEST_S=0.05) as address, socket.create_connection(address) as channel:

        def is_cut_off() -> bool:
            with contextlib.suppress(OSError):
                channel.sendall(b"X")
            return is_closed(channel)

        wait_for(is_cut_off, "the connection is closed")


# --- the process ------------------------------------------------------------------------------------------------------


def test_the_server_has_no_capability_and_no_file_of_the_agent(endpoint: Endpoint) -> None:
    """It cannot get one by execution either. Of the agent's descriptors it has only two sockets and standard error."""
    endpoint.beat()
    server = endpoint.health._server
    assert server is not None
    status = Path(f"/proc/{server.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1"
    open_files = {str(one.readlink()) for one in Path(f"/proc/{server.pid}/fd").iterdir()}
    ours = {f"socket:[{os.fstat(one).st_ino}]" for one in _descriptors() if _is_socket(one)}
    listener = endpoint.health._listener
    assert listener is not None
    assert open_files & ours == {f"socket:[{os.fstat(listener.fileno()).st_ino}]"}


def _descriptors() -> list[int]:
    return [int(one.name) for one in Path("/proc/self/fd").iterdir()]


def _is_socket(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("socket:")
    return False


def test_a_server_that_ended_is_started_again(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    """It is started at a later beat, at most every RETRY_S."""
    endpoint.beat()
    first = endpoint.health._server
    assert first is not None
    first.kill()
    first.wait()
    endpoint.health.beat(READY)
    assert endpoint.health._server is None
    assert "the health server ended with status -9" in caplog.text
    endpoint.now_s += RETRY_S
    endpoint.beat()
    assert endpoint.health._server not in (None, first)


def test_a_server_that_stands_still_does_not_stop_the_agent(endpoint: Endpoint) -> None:
    """Beats without room are left out, and a closed endpoint leaves no process."""
    server = endpoint.health._server
    assert server is not None
    os.kill(server.pid, 19)  # SIGSTOP
    for _ in range(10_000):
        endpoint.health.beat(READY)
    endpoint.health.close()
    assert server.returncode == -9


def test_an_address_that_cannot_be_bound_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The agent continues without the endpoint, reports it once, and serves when it can."""
    now_s = 0.0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        health = Health(taken.getsockname(), tmp_path / "agent.sock", clock=lambda: now_s)
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                health.beat(READY)
                now_s += RETRY_S
        assert caplog.text.count("cannot serve health") == 1
    try:
        with caplog.at_level(logging.INFO):
            health.beat(READY)
        assert "health is served" in caplog.text
        connection = http.client.HTTPConnection(*health.address, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/livez")
            assert connection.getresponse().status == 200
    finally:
        health.close()
