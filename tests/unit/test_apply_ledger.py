# SPDX-License-Identifier: Apache-2.0
"""The numbers in the ledger: written before use, and known to the next agent, wherever the previous one died."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.apply import ledger as ledger_module
from netpol_ebpf.apply.ledger import RETRY_S, Ledger, Numbers, with_lost_classes
from netpol_ebpf.apply.records import DAMAGED_SUFFIX
from netpol_ebpf.compiler import Compiler, KnownNumbers
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, EndpointKey, PolicyKey
from netpol_ebpf.resources.load import parse_documents

WEB = EndpointKey("Pod", "shop", "web")
DB = EndpointKey("Pod", "shop", "db")
RULE = Cause(
    CauseKind.RULE, Direction.EGRESS, "default", PolicyKey("NetworkPolicy", "shop", 'a "b"\n'), "", 3, Action.ALLOW
)
END = Cause(CauseKind.TIER_END, Direction.INGRESS, "default", PolicyKey("NetworkPolicy", "shop", "x"))
SITE = frozenset({frozenset({"*.example.com", "example.com"}), frozenset({"www.example.com"})})
NAMED = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: names}
spec: {types: [Egress], egress: [{action: Allow, destination: {domains: [www.example.org]}}]}
"""
NO_NAMES: frozenset[frozenset[str]] = frozenset()
PROFILE = Cause(CauseKind.PROFILE, Direction.INGRESS, profile="kns.shop", index=0, action=Action.ALLOW)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "numbers"


def recorded(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.open()
    ledger.record("rule", {RULE: 1, END: 2, PROFILE: 3})
    ledger.record("endpoint", {WEB: 7, DB: 8})
    ledger.record("identity", {"ab12": 16})
    ledger.record("name_class", {SITE: 4, NO_NAMES: 5})
    return ledger


def read(path: Path) -> Numbers:
    ledger = Ledger(path)
    numbers = ledger.open()
    ledger.close()
    return numbers


def test_numbers_come_back_as_they_were(path: Path) -> None:
    """Causes of every kind, endpoints, identities and name classes are read back equal, without the first ledger being closed."""
    first = recorded(path)
    assert read(path) == Numbers({RULE: 1, END: 2, PROFILE: 3}, {WEB: 7, DB: 8}, {"ab12": 16}, {SITE: 4, NO_NAMES: 5})
    first.close()


def test_number_of_a_class_that_was_lost_is_not_given_again() -> None:
    """A learned address whose class is not in the ledger keeps a number of its own: no new class gets it, and no name has it."""
    known = with_lost_classes({SITE: 1}, [0, 1, 2])
    assert known[SITE] == 1
    assert sorted(known.values()) == [1, 2]
    compiler = Compiler(known=KnownNumbers(name_classes=known))
    compiler.replace(derive(parse_documents(NAMED, "names.yaml").check()))
    compiler.commit()
    assert compiler.tables.names.get("www.example.org") == 3
    assert compiler.unused_name_classes() == {1, 2}
    assert {"domains": len(compiler.tables.domains), "names": len(compiler.tables.names)} == {"domains": 1, "names": 1}


def test_a_number_with_two_contents_has_none() -> None:
    """Such a ledger is damaged. The number is not given to another class, because learned addresses may have it."""
    known = with_lost_classes({SITE: 1, frozenset({frozenset({"www.example.org"})}): 1}, [])
    assert list(known.values()) == [1]
    assert SITE not in known
    compiler = Compiler(known=KnownNumbers(name_classes=known))
    compiler.replace(derive(parse_documents(NAMED, "names.yaml").check()))
    compiler.commit()
    assert compiler.tables.names.get("www.example.org") == 2


def test_what_went_does_not_come_back(path: Path) -> None:
    """A forgotten number is free for the next agent. A changed one has its last value."""
    ledger = recorded(path)
    ledger.forget("endpoint", [DB, DB])
    ledger.record("endpoint", {WEB: 9})
    ledger.close()
    assert read(path).endpoints == {WEB: 9}
    assert DB.name not in path.read_text()


def test_released_number_frees_what_had_it(path: Path) -> None:
    """The owner of a released number is forgotten, unless it has another number by now. Unknown numbers are ignored."""
    recorded(path).close()
    ledger = Ledger(path)
    ledger.open()
    ledger.record("rule", {END: 9})
    ledger.release("rule", [1, 2, 77])
    ledger.close()
    assert read(path).rules == {END: 9, PROFILE: 3}


def test_known_number_is_not_written_again(path: Path) -> None:
    """A known number adds no line."""
    ledger = recorded(path)
    size = path.stat().st_size
    ledger.record("endpoint", {WEB: 7})
    assert path.stat().st_size == size
    ledger.close()


def test_any_prefix_of_the_file_is_a_state(path: Path) -> None:
    """Wherever the writer died, the file has all completed lines."""
    recorded(path).close()
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        numbers = read(path)
        assert sum(1 for _ in numbers.entries()) == max(whole[:end].count(b"\n") - 1, 0)


def test_another_format_is_refused(path: Path) -> None:
    """A file that this program cannot read is not interpreted."""
    path.parent.mkdir()
    path.write_text('{"format": 99}\n["rule", [], 1]\n')
    with pytest.raises(PlatformError, match="format 99"):
        Ledger(path).open()


DAMAGE = {
    "no JSON": b"x", "no entry": b"[]", "too short": b'["rule"]', "unknown kind": b'["wish", [], 1]', "kind is a list": b"[[], [], 1]",
    "no cause": b'["rule", [1, 2], 3]', "null": b"null", "number": b"5", "not UTF-8": b"\xff\xfe", "too deep": b"[" * 100_000,
    "text for a number": b'["endpoint", ["Pod", "shop", "x"], "9"]', "negative": b'["endpoint", ["Pod", "shop", "x"], -5]',
    "too large": b'["endpoint", ["Pod", "shop", "x"], 1099511627776]', "a node's": b'["endpoint", ["Pod", "shop", "x"], 1048576]',
    "fraction": b'["endpoint", ["Pod", "shop", "x"], 2.5]', "list for a number": b'["endpoint", ["Pod", "shop", "x"], [1]]',
    "true": b'["endpoint", ["Pod", "shop", "x"], true]', "lists for names": b'["endpoint", [["Pod"], ["shop"], ["x"]], 9]',
    "text for a list": b'["endpoint", "Pod", 9]', "digest is a number": b'["identity", 5, 9]', "pattern is a number": b'["name_class", [["a", 5]], 9]',
    "class without sets": b'["name_class", ["a"], 9]', "large rule": b'["rule", null, 4294967296]',
    "half a character": b'["endpoint", ["Pod", "shop", "\\udfff"], 9]', "huge": b'["identity", "x", 1%s]' % (b"0" * 5000),
}  # fmt: skip


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_damaged_line_is_told_and_the_others_count(path: Path, line: bytes) -> None:
    """A damaged line is reported.

    The file is kept under another name, and a new one is written with all valid lines.
    """
    recorded(path).close()
    lines = path.read_bytes().split(b"\n")
    damaged = b"\n".join([lines[0], line, *lines[1:]])
    path.write_bytes(damaged)
    ledger = Ledger(path)
    assert ledger.open() == Numbers(
        {RULE: 1, END: 2, PROFILE: 3}, {WEB: 7, DB: 8}, {"ab12": 16}, {SITE: 4, NO_NAMES: 5}
    )
    (problem,) = ledger.problems
    assert (problem.slug, problem.severity, problem.location.file) == ("ledger", "warning", str(path))
    assert "line 2" in problem.message
    assert path.with_suffix(DAMAGED_SUFFIX).read_bytes() == damaged
    ledger.record("endpoint", {WEB: 3})
    ledger.close()
    again = Ledger(path)
    assert again.open().endpoints == {WEB: 3, DB: 8}
    assert again.problems == []
    again.close()


@pytest.mark.parametrize("first", [b"", b"x", b"[]", b"{}", b'{"format": "1"}', b'{"format": true}', b"[" * 1_000])
def test_file_of_no_format_is_told_and_counts_as_lost(path: Path, first: bytes) -> None:
    """The lines after an invalid first line could mean anything, so they are not used."""
    recorded(path).close()
    path.write_bytes(b"\n".join([first, *path.read_bytes().split(b"\n")[1:]]))
    ledger = Ledger(path)
    assert ledger.open() == Numbers()
    assert "line 1" in ledger.problems[0].message
    ledger.close()


@pytest.mark.parametrize(("kind", "number"), [("endpoint", 8), ("rule", 2), ("identity", 16)])
def test_number_of_several_is_nobody_s(path: Path, kind: str, number: int) -> None:
    """The program could not distinguish two pods, or two rules, with one number.

    Neither has it; all others keep theirs.
    """
    recorded(path).close()
    writer = Ledger(path)
    writer.open()
    writer.record("identity", {"cd34": 17})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        if line[0] == kind:
            line[2] = number
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = Ledger(path)
    everything = Numbers(
        {RULE: 1, END: 2, PROFILE: 3}, {WEB: 7, DB: 8}, {"ab12": 16, "cd34": 17}, {SITE: 4, NO_NAMES: 5}
    )
    everything._table(kind).clear()
    assert ledger.open() == everything
    assert f"{kind} number {number} is given to several" in ledger.problems[0].message
    ledger.close()
    again = Ledger(path)
    assert again.open() == everything
    assert again.problems == []
    again.close()


def test_number_that_passes_on_is_one_s_alone(path: Path) -> None:
    """A number that was recorded for a change that never came into force can be reused.

    Two numbers can also be exchanged.
    """
    ledger = recorded(path)
    other = EndpointKey("Pod", "shop", "other")
    ledger.record("endpoint", {other: 8})
    assert ledger.numbers.endpoints == {WEB: 7, other: 8}
    ledger.record("endpoint", {other: 7, WEB: 8})
    ledger.close()
    again = Ledger(path)
    assert again.open().endpoints == {WEB: 8, other: 7}
    assert again.problems == []
    with pytest.raises(AssertionError, match="several"):
        again.record("endpoint", {DB: 9, other: 9})
    again.close()


def test_file_does_not_grow_by_what_went(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not keep all that was added and removed over years, because the next agent could not read it."""
    monkeypatch.setattr(ledger_module, "SMALL_BYTES", 1000)
    ledger = recorded(path)
    for number in range(100, 400):
        ledger.record("endpoint", {DB: number})
        assert path.stat().st_size < 2000
    ledger.close()
    assert read(path).endpoints == {WEB: 7, DB: 399}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def stream(path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(path))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 30)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, stream, sparse, link])
@pytest.mark.parametrize("suffix", ["", ".draft"])
def test_what_is_no_file_of_numbers_keeps_nobody_waiting(path: Path, make: Callable[[Path], None], suffix: str) -> None:
    """It blocks neither the reading nor the writing of numbers. The next agent finds a regular file."""
    recorded(path).close()
    place = path.with_suffix(suffix)
    place.unlink(missing_ok=True)
    make(place)
    ledger = Ledger(path)
    ledger.open()
    assert [one.slug for one in ledger.problems] == ([] if suffix else ["ledger"])
    ledger.record("endpoint", {WEB: 3})
    ledger.close()
    assert read(path).endpoints[WEB] == 3


def test_what_is_no_file_is_kept_aside_too(path: Path) -> None:
    """A directory at the ledger's path is renamed."""
    path.mkdir(parents=True)
    ledger = Ledger(path)
    assert ledger.open() == Numbers()
    assert len(ledger.problems) == 1
    assert path.is_file()
    ledger.close()


class Full:
    """A file system that is full while ``is_full``: writes fail with the kernel's error, opening and reading do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        real = Path.open

        def opened(one: Path, mode: str = "r", **options: Any) -> Any:
            file = real(one, mode, **options)
            if mode[0] in "wax":
                return _Guarded(file, self)
            return file

        monkeypatch.setattr(Path, "open", opened)


class _Guarded:
    """A file whose writes fail while the disk is full."""

    def __init__(self, file: Any, disk: Full) -> None:
        self._real, self._disk = file, disk

    def _try(self) -> None:
        if self._disk.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, text: str) -> None:
        self._try()
        self._real.write(text)

    def writelines(self, lines: Any) -> None:
        self._try()
        self._real.writelines(lines)

    def flush(self) -> None:
        self._try()
        self._real.flush()

    def close(self) -> None:
        self._real.close()

    def __enter__(self) -> _Guarded:  # noqa: PYI034 - typing.Self comes with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Full:
    return Full(monkeypatch)


def test_full_disk_ends_nothing_and_is_made_up_for(path: Path, disk: Full) -> None:
    """Numbers that cannot be written are a problem. When there is room, all of them are written in one new file."""
    now_s = 0.0
    ledger = Ledger(path, lambda: now_s)
    ledger.open()
    ledger.record("endpoint", {WEB: 7})
    disk.is_full = True
    ledger.record("endpoint", {DB: 8})
    ledger.record("rule", {RULE: 1})
    ledger.forget("endpoint", [WEB])
    assert [(one.slug, one.severity) for one in ledger.problems] == [("ledger", "warning")]
    assert ledger.numbers == Numbers({RULE: 1}, {DB: 8}, {})
    now_s += RETRY_S
    ledger.try_again()
    assert len(ledger.problems) == 1
    disk.is_full = False
    ledger.try_again()
    assert len(ledger.problems) == 1, "it is not tried at every step"
    now_s += RETRY_S
    ledger.try_again()
    assert ledger.problems == []
    ledger.record("identity", {"ab": 16})
    ledger.close()
    assert read(path) == Numbers({RULE: 1}, {DB: 8}, {"ab": 16})


def test_start_on_a_full_disk_knows_what_was_written(path: Path, disk: Full) -> None:
    """The earlier agent's file is read. The failure to rewrite it is reported, and the file stays unchanged."""
    recorded(path).close()
    before = path.read_bytes()
    disk.is_full = True
    ledger = Ledger(path)
    assert ledger.open().endpoints == {WEB: 7, DB: 8}
    assert len(ledger.problems) == 1
    ledger.record("endpoint", {WEB: 9})
    assert path.read_bytes() == before
    assert not path.with_suffix(".draft").exists(), "what was begun takes room"
    ledger.close()


def test_really_full_file_system(tmp_path: Path) -> None:
    """On a full tmpfs of one page the ledger continues, and writes when there is room."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "small"
    place.mkdir()
    if libc.mount(b"none", bytes(place), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("missing feature: the right to mount a tmpfs")
    try:
        now_s = 0.0
        ledger = Ledger(place / "numbers", lambda: now_s)
        ledger.open()
        (place / "others").write_bytes(bytes((64 << 10) - 4096))  # one page is left for the ledger
        ledger.record("identity", {f"{number:064x}": number for number in range(1, 1000)})
        assert len(ledger.problems) == 1
        (place / "others").unlink()
        now_s += RETRY_S
        ledger.try_again()
        assert len(ledger.problems) == 1, "it does not fit: still told"
        ledger.forget("identity", [f"{number:064x}" for number in range(100, 1000)])
        now_s += RETRY_S
        ledger.try_again()
        assert ledger.problems == []
        ledger.close()
        assert len(read(place / "numbers").identities) == 99
    finally:
        assert libc.umount2(bytes(place), 0) == 0
