# SPDX-License-Identifier: Apache-2.0
"""Real DNS servers and real resolvers: what pods ask is learned, for the pod that asked, before it has the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

from dns_net import (
    BIND,
    CACHE,
    CLASSES,
    DNSMASQ,
    POD_A,
    POD_B,
    RACED,
    UNBOUND,
    WEB,
    WEB6,
    WEB_PORT,
    DnsNet,
    dns_net,
    missing_tools,
    raced_address,
)  # fmt: skip

from netpol_loader import abi

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        bool(missing_tools()), reason=f"{', '.join(missing_tools())}: scripts/setup.sh --dev installs them"
    ),
]

SERVERS = {"dnsmasq": DNSMASQ, "bind": BIND, "unbound": UNBOUND}
CHAIN = {CLASSES["*.wild.test"], CLASSES["target.other.test"]}


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnsNet]:
    with dns_net(tmp_path_factory.mktemp("dns")) as one:
        yield one


@pytest.fixture
def net(lasting: DnsNet) -> DnsNet:
    """Pods that have learned nothing."""
    lasting.forget()
    return lasting


def counted(net: DnsNet, reason: int) -> int:
    """Packets counted under a reason since the maps were made."""
    return net.scene.rig._counts("np_reason_count")[reason]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("transport", ["+notcp", "+tcp", "+noedns", "+bufsize=4096"])
@pytest.mark.parametrize("server", SERVERS)
def test_what_dig_asks_is_learned(net: DnsNet, server: str, transport: str, version: int) -> None:
    """Exact names, wildcards, chains and both types of addresses, by UDP and TCP, over both families."""
    at = f"@{SERVERS[server][version == 6]}"
    assert net.dig("a", at, transport, "wWw.wAtched.test") == [WEB]
    assert net.dig("a", at, transport, "www.watched.test", "AAAA") == [WEB6]
    assert net.dig("a", at, transport, "two.one.wild.test") == ["198.18.0.3"]
    assert net.dig("a", at, transport, "alias.wild.test") == ["target.other.test.", "198.18.0.5"]
    assert net.dig("a", at, transport, "plain.test") == ["198.18.0.4"]
    assert net.learned() == {WEB: {1}, WEB6: {1}, "198.18.0.3": {2}, "198.18.0.5": CHAIN}
    assert net.learned(POD_B) == {}


def test_a_node_local_cache(net: DnsNet) -> None:
    """A cache that is a process of the node is read like any server."""
    assert net.dig("a", f"@{CACHE}", "www.watched.test") == [WEB]
    assert net.dig("b", f"@{CACHE}", "+tcp", "one.wild.test") == ["198.18.0.2"]
    assert net.learned() == {WEB: {1}}
    assert net.learned(POD_B) == {"198.18.0.2": {2}}


def test_what_the_c_library_asks(net: DnsNet) -> None:
    """Glibc asks for A and AAAA at once; by TCP both questions are in one segment."""
    assert WEB in net.run("a", "getent", "ahosts", "www.watched.test")
    assert net.learned() == {WEB: {1}, WEB6: {1}}
    net.forget()
    resolv = Path("/etc/netns") / net.name("a") / "resolv.conf"
    before = resolv.read_text()
    try:
        resolv.write_text(before.replace("options", "options use-vc"))
        assert WEB in net.run("a", "getent", "ahosts", "www.watched.test")
    finally:
        resolv.write_text(before)
    assert net.learned() == {WEB: {1}, WEB6: {1}}


def test_curl(net: DnsNet) -> None:
    """Curl resolves and connects."""
    assert net.run("a", "curl", "-sS", f"http://www.watched.test:{WEB_PORT}/") == "yes"
    assert net.learned() == {WEB: {1}, WEB6: {1}}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("server", ["bind", "unbound"])
def test_an_answer_in_fragments_comes_again_by_tcp(net: DnsNet, server: str, version: int) -> None:
    """An answer that needs two fragments is cut; dig comes back by TCP, and all addresses are learned."""
    before = counted(net, abi.NP_REASON_DNS_TRUNCATED)
    found = net.dig("a", f"@{SERVERS[server][version == 6]}", "+bufsize=4096", "big.test")
    assert len(found) == 120
    assert counted(net, abi.NP_REASON_DNS_TRUNCATED) == before + 1
    assert net.learned() == {one: {CLASSES["big.test"]} for one in found}


def test_large_datagrams_over_large_links(net: DnsNet) -> None:
    """Where the links have room, an answer of 2 kB is read as it is."""
    for host, device in (("net", "eth0"), ("node", "to-net"), ("node", "to-a"), ("a", "eth0")):
        net.run(host, "ip", "link", "set", device, "mtu", "9000")
    try:
        before = counted(net, abi.NP_REASON_DNS_TRUNCATED)
        found = net.dig("a", f"@{BIND[0]}", "+bufsize=4096", "+ignore", "big.test")
        assert len(found) == 120
        assert counted(net, abi.NP_REASON_DNS_TRUNCATED) == before
        assert net.learned() == {one: {CLASSES["big.test"]} for one in found}
    finally:
        for host, device in (("net", "eth0"), ("node", "to-net"), ("node", "to-a"), ("a", "eth0")):
            net.run(host, "ip", "link", "set", device, "mtu", "1500")


RACE = """\
import socket, struct, sys
server, count, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
lost = []
for number in range(count):
    name = b"".join(bytes([len(one)]) + one for one in (b"n%d" % number, b"race", b"test")) + b"\\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.connect((server, 53))
        asking.send(struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + name + struct.pack("!HH", 1, 1))
        answer = asking.recv(4096)
    address = socket.inet_ntoa(answer[-4:])
    with socket.socket() as connection:
        connection.settimeout(1)  # a lost SYN is sent again after one second, so it counts as lost
        try:
            connection.connect((address, port))
        except OSError as error:
            lost.append((number, address, str(error)))
print(len(lost), lost[:3])
"""


@pytest.mark.parametrize("server", SERVERS)
def test_first_connections_win_every_race(net: DnsNet, server: str) -> None:
    """Right after each answer comes the first connection to its address; none is denied, and no agent runs."""
    net.only_names()
    refused = net.run("a", "curl", "-s", "-m", "1", f"http://{raced_address(0)}:{WEB_PORT}/", check=False)
    assert refused == ""
    lost = net.run("a", "/usr/bin/python3", "-c", RACE, SERVERS[server][0], str(RACED), str(WEB_PORT))
    assert lost.split()[0] == "0", lost
    assert net.learned(POD_B) == {}
    assert len(net.learned(POD_A)) > 0
