# SPDX-License-Identifier: Apache-2.0
"""Namespaces with two pods, a node and a network that has real DNS servers; the programs are on the pods' interfaces.

    a, b (pods) --- node --- net (dnsmasq, BIND, Unbound, a server of connections)

The rows are written by hand, as an agent would write them. No agent runs. Packets leave none of the namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dns_scene import DnsScene
from rig import ALLOW, DENY, PolicySet, Rig, Verdict, everything

from netpol_loader import abi
from netpol_loader.pins import attach
from netpol_loader.pins.dataplane import Dataplane

POD_A, POD_B = 21, 22
"""Numbers of the endpoints."""
ADDRESSES = {"a": ("10.9.1.2", "fd09:1::2"), "b": ("10.9.2.2", "fd09:2::2"), "net": ("10.9.9.2", "fd09:9::2")}
GATEWAYS = {"a": ("10.9.1.1", "fd09:1::1"), "b": ("10.9.2.1", "fd09:2::1"), "net": ("10.9.9.1", "fd09:9::1")}
DNSMASQ, BIND, UNBOUND = ("10.9.9.53", "fd09:9::53"), ("10.9.9.54", "fd09:9::54"), ("10.9.9.55", "fd09:9::55")
CACHE = "169.254.20.10"
"""Address of the node-local cache."""
WEB, WEB6 = "198.18.0.1", "2001:db8:18::1"
WEB_PORT = 8080
RACED = 2000
CLASSES = {"www.watched.test": 1, "*.wild.test": 2, "*.race.test": 3, "big.test": 4, "target.other.test": 5}
PATIENCE_S = 20.0
TOOLS = ("dnsmasq", "named", "unbound", "dig", "getent", "curl")
DOMAIN_LIST = 1


def missing_tools() -> list[str]:
    """The programs that scripts/setup.sh --dev installs and this machine lacks."""
    return [one for one in TOOLS if shutil.which(one, path=os.environ["PATH"] + ":/usr/sbin") is None]


def raced_address(number: int) -> str:
    """The address of n<number>.race.test."""
    return f"198.19.{number // 250}.{number % 250 + 1}"


@dataclass
class DnsNet:
    """The namespaces. ``scene``: rows and what was learned."""

    home: Path
    scene: DnsScene
    prefix: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def name(self, host: str) -> str:
        """The namespace of a host."""
        return f"{self.prefix}-{host}"

    def run(self, host: str, *command: str, check: bool = True) -> str:
        """Run a command in a namespace. Returns its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name(host), *command], capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, host: str, *command: str) -> None:
        """Start a process in a namespace."""
        with (self.home / f"{len(self.processes)}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(["ip", "netns", "exec", self.name(host), *command], stdout=log, stderr=log)
            )

    def dig(self, host: str, *words: str) -> list[str]:
        """The lines of `dig +short`."""
        return self.run(host, "dig", "+short", "+tries=1", "+time=5", *words).split()

    def learned(self, number: int = POD_A) -> dict[str, set[int]]:
        """What an endpoint has learned: classes by address."""
        return {address: set(classes) for (one, address), classes in self.scene.learned().items() if one == number}

    def forget(self) -> None:
        """Forget everything that was learned, and all connections."""
        rig = self.scene.rig
        for name in ("np_learned4", "np_learned6", "np_conn4", "np_conn6"):
            rows = rig.map(name)
            rows.delete_many([key for key, _ in rows.items()])
        for number in (POD_A, POD_B):
            self.scene.asks(number)
        rig.forget_flow_cache()

    def only_names(self) -> None:
        """Deny pod a everything but DNS and the names of race.test."""
        rig = self.scene.rig
        egress = PolicySet(40, [Verdict(DENY, 41), Verdict(ALLOW, 42)], l4_classes=2)
        for slot in (abi.NP_SLOT_TCP, abi.NP_SLOT_UDP):
            rig.atom(slot * 256, 53, 5)
        rig.l4_class(40, 5, 1)
        rig.endpoint(everything(43, ALLOW, 44), egress, number=POD_A, ifindex=self.ifindex("a"))
        denied = abi.np_verdict(
            rule=41, staged_rule=41, action=DENY, staged_action=DENY, flags=DOMAIN_LIST << abi.NP_VERDICT_DOMAIN_SHIFT
        )
        rig.map("np_verdict").put(struct.pack("=I", 40 * 64), bytes(denied))
        row = abi.np_domain(rank=0, staged_rank=0, rule=45, staged_rule=45)
        key = abi.np_domain_key(list=DOMAIN_LIST, name_class=CLASSES["*.race.test"])
        rig.map("np_domain").put(bytes(key), bytes(row))
        rig.dataplane.bump_generation()

    def ifindex(self, host: str) -> int:
        """The node's interface to a host."""
        with inside(self.name("node")):
            return socket.if_nametoindex(f"to-{host}")


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Be in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        assert libc.setns(there, 0) == 0
        try:
            yield
        finally:
            assert libc.setns(home, 0) == 0
    finally:
        os.close(home)
        os.close(there)


@contextmanager
def dns_net(home: Path) -> Iterator[DnsNet]:
    """Make the namespaces, the servers and the rows; remove them at the end."""
    prefix = f"npdns{os.getpid()}"
    dataplane = Dataplane.open(Path(f"/sys/fs/bpf/netpol-dns-net-{os.getpid()}"), sizes={"np_verdict": 65536})
    rig = Rig(dataplane)
    scene = DnsScene(rig)
    net = DnsNet(home, scene, prefix)
    try:
        _make_links(net)
        _write_rows(net)
        _start_servers(net)
        yield net
    finally:
        for one in net.processes:
            one.terminate()
        for one in net.processes:
            one.wait(10)
        for host in ("a", "b", "node", "net"):
            subprocess.run(["ip", "netns", "del", net.name(host)], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / net.name(host), ignore_errors=True)
        scene.close()
        rig.reader.close()
        dataplane.remove()


def _make_links(net: DnsNet) -> None:
    for host in ("node", "net", "a", "b"):
        subprocess.run(["ip", "netns", "add", net.name(host)], check=True)
        net.run(host, "ip", "link", "set", "lo", "up")
        net.run(host, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
    net.run("node", "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    for index, host in enumerate(("net", "a", "b")):
        macs = [f"02:09:00:00:0{index}:0{side}" for side in (1, 2)]
        subprocess.run(
            ["ip", "-n", net.name("node"), "link", "add", f"to-{host}", "address", macs[0], "type", "veth", "peer",
             "name", "eth0", "netns", net.name(host), "address", macs[1]], check=True,
        )  # fmt: skip
        for own, peer, width in zip(GATEWAYS[host], ADDRESSES[host], ("24", "64"), strict=True):
            net.run(
                "node", "ip", "addr", "add", f"{own}/{width}", "dev", f"to-{host}", *(["nodad"] if ":" in own else [])
            )
            net.run(host, "ip", "addr", "add", f"{peer}/{width}", "dev", "eth0", *(["nodad"] if ":" in own else []))
        net.run("node", "ip", "link", "set", f"to-{host}", "up")
        net.run(host, "ip", "link", "set", "eth0", "up")
        for own, peer in zip(GATEWAYS[host], ADDRESSES[host], strict=True):
            family = "-6" if ":" in own else "-4"
            net.run("node", "ip", family, "neigh", "replace", peer, "lladdr", macs[1], "dev", f"to-{host}")
            net.run(host, "ip", family, "neigh", "replace", own, "lladdr", macs[0], "dev", "eth0")
            net.run(host, "ip", family, "route", "replace", "default", "via", own)
    for addresses in (DNSMASQ, BIND, UNBOUND):
        for address in addresses:
            net.run("net", "ip", "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
            net.run("node", "ip", "route", "add", address, "via", ADDRESSES["net"][":" in address])
    for family, prefix in (("-4", "198.18.0.0/15"), ("-6", "2001:db8:18::/64")):
        net.run("net", "ip", family, "route", "add", "local", prefix, "dev", "lo")
        net.run("node", "ip", family, "route", "add", prefix, "via", ADDRESSES["net"][family == "-6"])
    net.run("node", "ip", "addr", "add", CACHE, "dev", "lo")
    for host in ("a", "b"):
        directory = Path("/etc/netns") / net.name(host)
        directory.mkdir(parents=True)
        (directory / "resolv.conf").write_text(f"nameserver {DNSMASQ[0]}\noptions timeout:5 attempts:1\n")
        (directory / "nsswitch.conf").write_text("hosts: dns\n")


def _write_rows(net: DnsNet) -> None:
    scene, rig = net.scene, net.scene.rig
    names = rig.map("np_name")
    names.delete_many([key for key, _ in names.items()])
    for text, number in CLASSES.items():
        scene.pattern(text, number)
    for addresses in (DNSMASQ, BIND, UNBOUND, (CACHE,)):
        for address in addresses:
            scene.trust(address)
    for number, host in ((POD_A, "a"), (POD_B, "b")):
        ifindex = net.ifindex(host)
        base = number * 2
        rig.endpoint(
            everything(base, ALLOW, base), everything(base + 1, ALLOW, base + 1), number=number, ifindex=ifindex
        )
        for address in ADDRESSES[host]:
            rig.address(address, 200 + number, number)
        scene.asks(number)
    for host in GATEWAYS:
        rig.local(*GATEWAYS[host])
    rig.local(CACHE)
    rig.epoch()
    with inside(net.name("node")):
        for host in ("a", "b"):
            attach.attach(socket.if_nametoindex(f"to-{host}"), rig.dataplane)


RECORDS = [
    ("www.watched.test", "A", WEB), ("www.watched.test", "AAAA", WEB6), ("one.wild.test", "A", "198.18.0.2"),
    ("two.one.wild.test", "A", "198.18.0.3"), ("plain.test", "A", "198.18.0.4"), ("alias.wild.test", "CNAME", "target.other.test"),
    ("target.other.test", "A", "198.18.0.5"), ("target.other.test", "AAAA", "2001:db8:18::5"),
    *(("big.test", "A", f"198.18.1.{number}") for number in range(1, 121)),
    *((f"n{number}.race.test", "A", raced_address(number)) for number in range(RACED)),
]  # fmt: skip


def _start_servers(net: DnsNet) -> None:
    (net.home / "hosts").write_text("".join(f"{data} {name}\n" for name, kind, data in RECORDS if kind != "CNAME"))
    net.start(
        "net", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
        f"--addn-hosts={net.home}/hosts", "--cname=alias.wild.test,target.other.test", "--local-ttl=60", "--bind-interfaces",
        "--edns-packet-max=4096", *(f"--listen-address={one}" for one in DNSMASQ), "--pid-file", "--local=/test/",
    )  # fmt: skip
    zone = "$TTL 60\n@ SOA ns.test. root.test. 1 60 60 60 60\n@ NS ns.test.\nns.test. A 10.9.9.54\n"
    zone += "".join(f"{name}. {kind} {data}{'.' if kind == 'CNAME' else ''}\n" for name, kind, data in RECORDS)
    (net.home / "test.zone").write_text(zone)
    (net.home / "named.conf").write_text(
        f'options {{ directory "{net.home}"; pid-file none; session-keyfile none; recursion no; dnssec-validation no;\n'
        f"listen-on {{ {BIND[0]}; }}; listen-on-v6 {{ {BIND[1]}; }}; max-udp-size 4096; edns-udp-size 4096; max-records-per-type 0; }};\n"
        "controls {};\n"
        f'zone "test" {{ type primary; file "{net.home}/test.zone"; }};\n'
    )
    net.start("net", "named", "-g", "-c", str(net.home / "named.conf"), "-u", "root")
    (net.home / "unbound.conf").write_text(
        f'server: \n chroot: ""\n username: ""\n directory: "{net.home}"\n pidfile: ""\n use-syslog: no\n do-daemonize: no\n'
        f" interface: {UNBOUND[0]}\n interface: {UNBOUND[1]}\n access-control: 0.0.0.0/0 allow\n access-control: ::/0 allow\n"
        ' use-caps-for-id: yes\n module-config: "iterator"\n local-zone: "test." nodefault\n do-not-query-localhost: no\n'
        " edns-buffer-size: 4096\n max-udp-size: 4096\n"
        f"remote-control: \n control-enable: no\nstub-zone: \n name: test\n stub-addr: {BIND[0]}\n"
    )
    net.start("net", "unbound", "-d", "-c", str(net.home / "unbound.conf"))
    net.start(
        "node", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
        f"--server={BIND[0]}", f"--listen-address={CACHE}", "--bind-interfaces", "--pid-file",
    )  # fmt: skip
    net.start("net", "/usr/bin/python3", "-c", WEB_SERVER)
    for server in (DNSMASQ, BIND, UNBOUND):
        _await_server(net, server[0])
    _await_server(net, CACHE)
    net.forget()


def _await_server(net: DnsNet, server: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (
        net.run("a", "dig", "+short", "+tries=1", "+time=1", f"@{server}", "plain.test", check=False).strip()[:3]
        != "198"
    ):
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in sorted(net.home.glob("*.log")))
            raise AssertionError(f"{server} does not answer:\n{logs}")


WEB_SERVER = f"""\
import socket, selectors
picker = selectors.DefaultSelector()
for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((address, {WEB_PORT}))
    server.listen(512)
    picker.register(server, selectors.EVENT_READ)
while True:
    for key, _ in picker.select():
        connection = key.fileobj.accept()[0]
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: 3\\r\\n\\r\\nyes")
        connection.close()
"""
