# SPDX-License-Identifier: Apache-2.0
"""The CNI plugin without a node: its output, its errors and its JSON parser, all under AddressSanitizer.

tests/netns/test_cni_plugin.py tests its work on interfaces.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
DEPTH = 32
ROUNDS = 200_000 if os.environ.get("NETPOL_FAULTS") == "long" else 4_000
RUNS = 3_000 if os.environ.get("NETPOL_FAULTS") == "long" else 40

RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/none"}],
    "ips": [{"interface": 2, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}, {"address": "fd00:9::2/64"}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {},
}
CONFIG = {"cniVersion": "1.0.0", "name": "pods", "type": "netpol-cni", "prevResult": RESULT}
ENVIRONMENT = {
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/nonexistent/netns",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db;K8S_POD_UID=1-2",
    "CNI_PATH": "/opt/cni/bin",
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, built with sanitizers."""
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("make and cc are not installed: the plugin cannot be built")
    built = tmp_path_factory.mktemp("cni") / "netpol-cni"
    subprocess.run(["make", "-s", "-C", ROOT / "cni", f"OUT={built}", f"CFLAGS={SANITIZE}", "LDFLAGS="], check=True)
    return built


Run = Callable[..., tuple[int, bytes, str]]


@pytest.fixture(scope="module")
def run(plugin: Path) -> Run:
    """Run a command. Returns the exit code, the output and the log."""

    def call(command: str, config: Any, /, **environment: str | None) -> tuple[int, bytes, str]:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        given = {"CNI_COMMAND": command, **ENVIRONMENT, **environment}
        done = subprocess.run(
            [plugin], input=text, env={name: value for name, value in given.items() if value is not None},
            check=False, capture_output=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr.decode()

    return call


def error_of(ran: tuple[int, bytes, str]) -> dict[str, Any]:
    """The error object with which a command ended. It must be the whole output."""
    code, printed, logged = ran
    assert (code, logged) == (1, ""), ran
    error = json.loads(printed)
    assert isinstance(error, dict)
    assert set(error) <= {"cniVersion", "code", "msg", "details"}
    assert error["cniVersion"] in VERSIONS
    assert isinstance(error["code"], int)
    assert error["msg"]
    return error


class Agent:
    """A control socket with one answer to every request (None: it disconnects). It records the requests."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.path, self.answer = path, answer
        self.asked: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            channel, _ = self._listener.accept()
            with channel, channel.makefile("rb") as lines:
                line = lines.readline()
                if line == b"end\n":
                    return
                self.asked.append(line)
                if self.answer is not None:
                    channel.sendall(self.answer)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(self.path))
            channel.sendall(b"end\n")
        self._thread.join()
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[bytes | None], Agent]]:
    """A function that starts an agent with an answer."""
    started: list[Agent] = []

    def start(answer: bytes | None) -> Agent:
        started.append(Agent(tmp_path / f"{len(started)}.sock", answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


def status_config(agent: Agent, **fields: Any) -> dict[str, Any]:
    return {"cniVersion": "1.1.0", "name": "pods", "type": "netpol-cni", "socket": str(agent.path), **fields}


# --- what it says -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", b'{"cniVersion": "1.0.0"}'])
def test_version(run: Run, text: bytes) -> None:
    """VERSION lists all versions, in the version of the caller. It needs only the variable with the command."""
    code, printed, _ = run("VERSION", text, **dict.fromkeys(ENVIRONMENT))
    assert code == 0
    assert json.loads(printed) == {"cniVersion": "1.0.0" if text else "1.1.0", "supportedVersions": VERSIONS}


@pytest.mark.parametrize("command", ["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION"])
@pytest.mark.parametrize("version", ["2.0.0", "0.2.0", "1.1", "", None, 1, "1.0.0\u0000"])
def test_an_unknown_version(run: Run, command: str, version: Any) -> None:
    """For an unknown or missing version, every command ends with code 1."""
    assert error_of(run(command, {**CONFIG, "cniVersion": version}))["code"] == 1


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")])
def test_a_command_that_is_newer_than_the_version(run: Run, command: str, version: str) -> None:
    """A command that the configuration's version does not have ends with code 1."""
    assert error_of(run(command, {**CONFIG, "cniVersion": version}))["code"] == 1


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_what_has_nothing_to_undo(run: Run, command: str) -> None:
    """DEL and GC succeed without output. They need no agent, namespace, result or pod name."""
    config = {"cniVersion": "1.1.0", "name": "pods", "cni.dev/valid-attachments": []}
    assert run(command, config, CNI_NETNS=None, CNI_ARGS=None) == (0, b"", "")


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ("ADD", {"CNI_CONTAINERID": None}),
        ("ADD", {"CNI_NETNS": None}),
        ("ADD", {"CNI_NETNS": ""}),
        ("ADD", {"CNI_IFNAME": None}),
        ("ADD", {"CNI_IFNAME": "sixteen-letters-"}),
        ("ADD", {"CNI_IFNAME": "a/b"}),
        ("ADD", {"CNI_IFNAME": ".."}),
        ("ADD", {"CNI_CONTAINERID": "../x"}),
        ("ADD", {"CNI_ARGS": None}),
        ("ADD", {"CNI_ARGS": "K8S_POD_NAMESPACE=shop"}),
        ("ADD", {"CNI_ARGS": "K8S_POD_NAMESPACE=;K8S_POD_NAME=db"}),
        ("ADD", {"CNI_ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db;K8S_POD_NAME=web"}),
        ("ADD", {"CNI_ARGS": f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={'x' * 300}"}),
        ("CHECK", {"CNI_NETNS": None}),
        ("DEL", {"CNI_CONTAINERID": None}),
        ("DEL", {"CNI_IFNAME": None}),
        ("REMOVE", {}),
        ("", {}),
        ("ADD\n\x1b[1m\xff", {}),
    ],
)
def test_a_bad_environment(run: Run, command: str, environment: dict[str, str | None]) -> None:
    """A missing or invalid value in the environment ends with code 4."""
    assert error_of(run(command, CONFIG, **environment))["code"] == 4


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prevResult": None}, 7),
        ({"prevResult": []}, 7),
        ({"prevResult": {**RESULT, "ips": []}}, 7),
        ({"prevResult": {**RESULT, "ips": None}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"interface": 1, "address": "10.9.0.2/24"}]}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"interface": 3, "address": "10.9.0.2/24"}]}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"interface": -1, "address": "10.9.0.2/24"}]}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"interface": 4294967296, "address": "10.9.0.2/24"}]}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"address": 7}]}}, 7),
        ({"prevResult": {**RESULT, "ips": [{"address": f"10.9.0.2/{'0' * 5000}"}]}}, 7),
        ({"socket": "run/agent.sock"}, 7),
        ({"socket": "/" + "x" * 200}, 7),
        ({"socket": 7}, 7),
        ({"timeout": 0}, 7),
        ({"timeout": 601}, 7),
        ({"timeout": "30"}, 7),
        ({"timeout": 1.5}, 7),
        ({"posture": "Open"}, 7),
        ({"posture": True}, 7),
        ({"timeuot": 3}, 2),
        ({}, 3),
    ],
)
def test_a_bad_configuration(run: Run, change: dict[str, Any], code: int) -> None:
    """An invalid configuration ends ADD and CHECK in any posture. The last row is a valid one without a namespace."""
    for command in ("ADD", "CHECK"):
        for posture in ({}, {"posture": "open"}):
            assert error_of(run(command, {**CONFIG, **posture, **change}))["code"] == code


def test_a_field_twice(run: Run) -> None:
    """A repeated field is an error, because other programs might use its other value."""
    text = json.dumps(CONFIG)[:-1].encode() + rb', "posture": "closed", "p\u006fsture": "open"}'
    assert error_of(run("ADD", text))["code"] == 7


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a":1}x', b"\xff", b"nul", b"[" * 100_000, b" " * (2 << 20)])
def test_what_is_no_configuration(run: Run, text: bytes) -> None:
    """Any text except one JSON object ends with code 6."""
    assert error_of(run("ADD", text))["code"] == 6


# --- the agent's word ---------------------------------------------------------------------------------------------------


def test_status(run: Run, agent: Callable[[bytes | None], Agent]) -> None:
    """STATUS succeeds if the agent is ready, and needs nothing else."""
    ready = agent(b'{"in_force":true}\n')
    assert run("STATUS", status_config(ready)) == (0, b"", "")
    assert [json.loads(one) for one in ready.asked] == [{"op": "ready"}]


@pytest.mark.parametrize(
    "answer",
    [
        b'{"in_force":false}\n',
        b'{"in_force":true,"error":"no"}\n',
        b'{"in_force":true,"in_force":true}\n',
        b"{}\n",
        b"true\n",
        b'{"in_force":true\n',
        b'{"error":7}\n',
        b'{"error":"no \\u0000"}\n',
        b'{"error":"unknown operation","hint":"","slug":"usage"}\n',
        b"x" * 5000,
        b"\n",
    ],
)
def test_an_agent_that_does_not_say_yes(run: Run, agent: Callable[[bytes | None], Agent], answer: bytes) -> None:
    """Any other answer counts as none: an error at once if the posture is closed, a line in the log if it is open."""
    other = agent(answer)
    assert error_of(run("STATUS", status_config(other)))["code"] == 50
    assert len(other.asked) == 1
    code, printed, logged = run("STATUS", status_config(other, posture="open"))
    assert (code, printed) == (0, b"")
    assert "NOT known to be in force" in logged


def test_an_agent_that_hangs_up(run: Run, agent: Callable[[bytes | None], Agent]) -> None:
    """If the agent disconnects, or has no room, the plugin asks again."""
    for answer in (None, b'{"error":"there are too many connections","slug":"unreachable"}\n'):
        other = agent(answer)
        assert error_of(run("STATUS", status_config(other)))["code"] == 50
        assert len(other.asked) > 1


def test_the_agents_reason_is_told(run: Run, agent: Callable[[bytes | None], Agent]) -> None:
    """The agent's reason is in the error's details, escaped whatever it contains."""
    other = agent(b'{"error":"not yet:\\u001b[1m\\n\\"db\\" \xc3\xa9","slug":"usage"}\n')
    assert error_of(run("STATUS", status_config(other)))["details"].startswith('not yet:\x1b[1m\n"db" ')
    _, _, logged = run("STATUS", status_config(other, posture="open"))
    assert logged.count("\n") == 1
    assert logged[:-1].isprintable()


def test_no_agent(run: Run, tmp_path: Path) -> None:
    """Without an agent STATUS reports this, and names the socket."""
    config = {"cniVersion": "1.1.0", "name": "pods", "type": "netpol-cni", "socket": str(tmp_path / "none.sock")}
    error = error_of(run("STATUS", config))
    assert error["code"] == 50
    assert "none.sock" in error["details"]


# --- the reader of JSON -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(plugin: Path) -> Callable[[list[bytes]], list[bytes]]:
    """The plugin's parse results for texts, in the notation of cni_json.c."""
    built = plugin.with_name("json")
    sources = [Path(__file__).with_name("cni_json.c"), ROOT / "cni" / "json.c"]
    subprocess.run(["cc", *SANITIZE.split(), "-I", ROOT / "cni", "-o", built, *sources], check=True)

    def call(texts: list[bytes]) -> list[bytes]:
        given = b"".join(struct.pack("=I", len(text)) + text for text in texts)
        lines = subprocess.run([built], input=given, check=True, capture_output=True).stdout.split(b"\n")
        assert lines.pop() == b""
        return lines

    return call


class Text(str):
    """A number or word as it was written."""

    __slots__ = ()


def expected(text: bytes) -> bytes:
    """The expected output of cni_json.c, by Python's JSON parser and the plugin's stricter rules."""

    def refuse(_word: str) -> None:
        raise ValueError

    def show(value: Any, depth: int) -> str:
        if isinstance(value, Text):
            return f"{value} "
        if isinstance(value, str):
            value.encode()
            return f'"{value.encode().hex()} '
        if isinstance(value, (list, tuple)):
            if depth == DEPTH:
                raise ValueError
            inside = value if isinstance(value, list) else [part for pair in value for part in pair]
            return f"{'[' if isinstance(value, list) else '{'}{''.join(show(one, depth + 1) for one in inside)}]"
        return {None: "null ", True: "true ", False: "false "}[value]

    try:
        value = json.loads(
            text.decode(), object_pairs_hook=tuple, parse_int=Text, parse_float=Text, parse_constant=refuse
        )
        return show(value, 0).encode()
    except (ValueError, RecursionError):
        return b"no"


SEEDS = [
    json.dumps(CONFIG).encode(),
    json.dumps(RESULT, indent=2).encode(),
    b'{"a": [0, -0, 1.5e+3, -12E-7, "", "\\u00e9\\ud83d\\ude00\\\\\\/\\b\\f\\n\\r\\t\\"", null, true, false, {}, []]}',
    '["é", "€", "😀", "\ud7ff", "\ue000", "\U0010ffff"]'.encode(),
    b"[" * 33 + b"]" * 33,
    b"[" * 32 + b"]" * 32,
    b'{"a":' * 31 + b"1" + b"}" * 31,
]
PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00", b"\\uD83D\\uDE00", b"0", b"-", b".", b"e", b"E+", b"01",
    b"null", b"nan", b"NaN", b"Infinity", b"nul", b" ", b"\t", b"\n", b"\r", b"\x0b", b"\x00", b"\x1f", b"\x7f", b"\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\x80", b"\xe2\x82", b"/*x*/", b"'a'",
]  # fmt: skip


def mutated(source: random.Random, text: bytes) -> bytes:
    """A text with some bytes removed, doubled, changed or inserted."""
    draft = bytearray(text)
    for _ in range(source.randint(1, 4)):
        at = source.randint(0, len(draft))
        end = min(len(draft), at + source.randint(0, 4))
        way = source.randrange(4)
        if way == 0:
            del draft[at:end]
        elif way == 1:
            draft[at:at] = draft[at:end]
        elif way == 2:
            draft[at:end] = bytes(source.randrange(256) for _ in range(end - at))
        else:
            draft[at:at] = source.choice(PIECES)
    return bytes(draft)


def test_the_reader_agrees(read: Callable[[list[bytes]], list[bytes]]) -> None:
    """The parser accepts what Python accepts, except for stricter rules, with equal values.

    It reads nothing outside the text.
    """
    source = random.Random(1)
    texts = [
        *SEEDS,
        *PIECES,
        *(b'"%b"' % one for one in PIECES),
        b"",
        *(mutated(source, source.choice(SEEDS)) for _ in range(ROUNDS)),
    ]
    found = read(texts)
    assert len(found) == len(texts)
    wanted = [expected(text) for text in texts]
    for text, line, want in zip(texts, found, wanted, strict=True):
        if b"\\u0000" not in text:  # a C string cannot have this character
            assert line == want, text
    accepted = sum(line != b"no" for line in found)
    assert len(texts) // 10 < accepted < len(texts)


def test_the_readers_bounds(read: Callable[[list[bytes]], list[bytes]]) -> None:
    """The parser accepts as many values as it has room for, and no more."""
    full = b"[" + b",".join([b"1"] * (16384 - 1)) + b"]"
    line, more = read([full, full[:-1] + b",1]"])
    assert line == b"[" + b"1 " * (16384 - 1) + b"]"
    assert more == b"no"


def test_the_plugin_never_breaks(run: Run) -> None:
    """For any configuration the result is success or one error object, and never a signal or a sanitizer's report."""
    source = random.Random(2)
    text = json.dumps({**CONFIG, "cniVersion": "1.1.0", "socket": "/nonexistent/s", "timeout": 1}).encode()
    codes: dict[int, int] = {}
    for number in range(RUNS):
        ran = run(["ADD", "CHECK", "DEL", "GC", "VERSION"][number % 5], mutated(source, text))
        if ran[0]:
            code = error_of(ran)["code"]
            codes[code] = codes.get(code, 0) + 1
    assert {3, 6} <= codes.keys()


def test_any_environment(run: Run) -> None:
    """The same holds for any environment."""
    source = random.Random(3)
    values: Mapping[str, str] = ENVIRONMENT
    for _ in range(RUNS):
        changed = {
            name: mutated(source, value.encode()).replace(b"\0", b"").decode("utf-8", "surrogateescape")
            for name, value in values.items()
            if name != "CNI_PATH"
        }
        error_of(run("ADD", CONFIG, **changed))
