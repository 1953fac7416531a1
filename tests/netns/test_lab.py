# SPDX-License-Identifier: Apache-2.0
"""The laboratory itself: without enforcement it connects all hosts, and nothing of it remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from netpol_ebpf.errors import PlatformError, UsageError
from netpol_ebpf.lab import guard, laboratory
from netpol_ebpf.lab.attempt import Attempt, Reachability
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import ICMP, ICMPV6, TCP, UDP, Host, Listen

pytestmark = pytest.mark.netns

LISTENS = (Listen(TCP, 80), Listen(UDP, 53))
HOSTS = (
    Host("internet", None, (ip_address("192.0.2.1"), ip_address("2001:db8::1")), LISTENS),
    Host("node", "internet", (ip_address("172.30.0.10"), ip_address("fd00:172:30::10")), LISTENS, interface="up0"),
    Host("outside", "internet", (ip_address("198.51.100.9"), ip_address("2001:db8:51::9")), LISTENS),
    Host("shop/a", "node", (ip_address("10.244.1.10"), ip_address("fd00:10:244::a")), LISTENS),
    Host("shop/b", "node", (ip_address("10.244.1.11"), ip_address("fd00:10:244::b")), LISTENS),
)
A4 = ip_address("10.244.1.10")
DEADLINE_S = 10.0


def wait_until(condition: Callable[[], bool]) -> bool:
    """Poll until the condition is true. Returns False after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def namespaces(token: str) -> list[str]:
    """The named network namespaces of one laboratory."""
    return [path.name for path in guard.NETNS_DIR.glob(f"{token}-*")]


def own_links() -> set[str]:
    """(name, flags, addresses) of the machine's own interfaces."""
    listed = json.loads(subprocess.check_output(["ip", "-json", "address", "show"]))
    kept = ("ifname", "flags", "address", "mtu")
    return {
        json.dumps([*(link.get(name) for name in kept), [info["local"] for info in link["addr_info"]]])
        for link in listed
    }


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One laboratory for the tests that do not change it."""
    with Lab(HOSTS) as built:
        yield built


def test_everybody_reaches_everybody_when_nothing_is_enforced(lab: Lab) -> None:
    """TCP, UDP and echo requests, IPv4 and IPv6, between all pairs, through one and two routers."""
    attempts = [
        Attempt(source.name, address, protocol, port)
        for source in HOSTS
        for target in HOSTS
        if target is not source
        for address in target.addresses
        for protocol, port in [(TCP, 80), (UDP, 53), (ICMP if address.version == 4 else ICMPV6, 0)]
    ]
    assert [result for result in lab.attempt(attempts, deadline_s=5.0) if not result.reached] == []


def test_a_closed_port_is_refused_and_a_missing_address_unreachable(lab: Lab) -> None:
    """A failure without a denial is distinguished from silence."""
    attempts = [
        Attempt("shop/b", A4, TCP, 81),
        Attempt("shop/b", A4, UDP, 81),
        Attempt("shop/b", ip_address("10.244.1.99"), TCP, 80),
    ]
    outcomes = [result.outcome for result in lab.attempt(attempts, deadline_s=5.0)]
    assert outcomes == [Reachability.REFUSED, Reachability.REFUSED, Reachability.UNREACHABLE]


def test_silence_is_reported_and_an_open_connection_notices_it(lab: Lab) -> None:
    """A black hole on the node silences new connections and the open one. Without it both work again."""
    attempts = [Attempt("shop/b", A4, TCP, 80), Attempt("shop/b", A4, UDP, 53), Attempt("shop/b", A4, ICMP)]
    held = lab.prober.hold(attempts[0])
    assert held is not None
    assert held.exchange()
    lab.run("node", ["ip", "rule", "add", "pref", "10", "to", "10.244.1.10", "blackhole"])
    try:
        assert [result.outcome for result in lab.attempt(attempts)] == [Reachability.SILENT] * 3
        assert not held.exchange()
        assert lab.prober.hold(attempts[0], 0.4) is None
    finally:
        lab.run("node", ["ip", "rule", "del", "pref", "10"])
    assert [result.outcome for result in lab.attempt(attempts)] == [Reachability.REACHED] * 3
    # The lost segment is retransmitted after a growing pause, before anything new is delivered.
    assert wait_until(held.exchange)
    held.close()


def test_source_port_and_protocols(lab: Lab) -> None:
    """A chosen source port is used. A protocol without sockets here is a usage error, and not a denial."""
    held = lab.prober.hold(Attempt("shop/b", A4, TCP, 80, source_port=40123))
    assert held is not None
    assert held.source_port == 40123
    held.close()
    with pytest.raises(UsageError, match="protocol 132"):
        lab.attempt([Attempt("shop/b", A4, 132, 80)])


def test_a_process_runs_inside_and_sees_bpffs(lab: Lab) -> None:
    """Commands see the namespace's interfaces and the machine's own mounts. Their output is returned."""
    assert "10.244.1.11/32" in lab.run("shop/b", ["ip", "-brief", "address", "show", "eth0"]).stdout
    inside = lab.run("shop/b", ["stat", "--format=%d %i", "/sys"]).stdout.split()
    outside = Path("/sys").stat()
    assert [int(text) for text in inside] == [outside.st_dev, outside.st_ino]


def test_a_started_process_is_stopped(lab: Lab) -> None:
    """`stop` ends a process and returns its exit code. A process that ignores SIGTERM is killed."""
    assert lab.stop(lab.start("shop/a", ["sleep", "60"])) == -signal.SIGTERM


def test_the_machine_keeps_its_interfaces(lab: Lab) -> None:
    """A second laboratory with the same plan runs beside the first, and the machine's own links do not change."""
    before = own_links()
    with Lab(HOSTS) as second:
        assert own_links() == before
        assert second.attempt([Attempt("shop/b", A4, TCP, 80)])[0].reached
        assert lab.attempt([Attempt("shop/b", A4, TCP, 80)])[0].reached
    assert own_links() == before
    assert namespaces(second.token) == []


def test_all_is_removed_after_an_exception_with_processes_and_directories(tmp_path: Path) -> None:
    """Namespaces, the processes inside them, and the recorded directories are gone."""
    directory = tmp_path / "pins"
    pids: list[int] = []

    def work(lab: Lab) -> None:
        with lab:
            (directory / "below").mkdir(parents=True)
            (directory / "below" / "file").touch()
            # By setsid it is no child of a process that `stop` would end.
            lab.run("shop/a", ["sh", "-c", "setsid --fork sleep 60 >/dev/null 2>&1"])
            assert wait_until(lambda: guard.processes_in(lab.namespace_of["shop/a"]) != [])
            pids.extend(guard.processes_in(lab.namespace_of["shop/a"]))
            raise RuntimeError("on purpose")

    lab = Lab(HOSTS, directories=[directory])
    with pytest.raises(RuntimeError, match="on purpose"):
        work(lab)
    assert namespaces(lab.token) == []
    assert not directory.exists()
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)


def test_a_failed_step_removes_what_was_built(tmp_path: Path) -> None:
    """The second use of an interface name fails. The error has the command, and nothing remains."""
    hosts = [HOSTS[0], *(Host(f"h{n}", "internet", (), interface="same0") for n in range(2))]
    lab = Lab(hosts, directories=[tmp_path / "never"])
    with pytest.raises(PlatformError, match="-batch -` failed: .*File exists"):
        lab.build()
    assert namespaces(lab.token) == []


BUILDER = """
import signal, sys
from ipaddress import ip_address
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import Host
with Lab([Host("root", None, ()), Host("leaf", "root", (ip_address("192.0.2.9"),))]) as lab:
    lab.start("leaf", ["sleep", "60"])
    print(lab.token, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_all_is_removed_when_the_builder_is_ended(number: signal.Signals) -> None:
    """After Ctrl-C, SIGTERM and even SIGKILL of the builder nothing remains, because the guard removes everything."""
    with subprocess.Popen([sys.executable, "-c", BUILDER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        token = builder.stdout.readline().decode().strip()
        assert len(namespaces(token)) == 2
        os.kill(builder.pid, number)
        builder.wait(DEADLINE_S)
    assert wait_until(lambda: namespaces(token) == [])


def test_all_is_removed_although_the_guard_was_killed() -> None:
    """The builder notices that the guard is dead, and does its work."""
    with Lab(HOSTS) as lab:
        assert lab._guard is not None
        lab._guard.kill()
        lab._guard.wait()
    assert namespaces(lab.token) == []


def test_removal_reports_what_it_cannot_do(tmp_path: Path) -> None:
    """A missing object is skipped. An object that cannot be removed is named, and all others are still removed."""
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    kept.mkdir()
    gone.mkdir()
    subprocess.run(["mount", "--bind", str(kept), str(kept)], check=True)
    try:
        failures = guard.remove(["np-never-made"], [kept, tmp_path / "absent", gone])
    finally:
        subprocess.run(["umount", str(kept)], check=True)
    assert len(failures) == 1
    assert str(kept) in failures[0]
    assert not gone.exists()


def test_interfaces_that_the_kernel_adds_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback tunnel (sit0) in a new namespace is never up.

    A down interface of the plan still stops the laboratory.
    """
    with Lab(HOSTS[:2]) as built:
        built.run("node", ["ip", "link", "add", "sit9", "type", "veth", "peer", "name", "sit8"])  # both ends stay down
        built._await_links()
        built.run("node", ["ip", "link", "set", "eth0", "down"])
        monkeypatch.setattr(laboratory, "LINKS_DEADLINE_S", 0.2)
        with pytest.raises(PlatformError, match="not in operation: (up0|eth0)$"):
            built._await_links()
