# SPDX-License-Identifier: Apache-2.0
"""The same flat rules for nftables and for iptables with ipset, each in two forms.

*rules*: a verdict map (nft) or a match on the address (iptables) finds the endpoint's chain. The chain has one rule for
each rule of the policies; several peers of a rule are in a set. Agents that translate policy into netfilter rules do
the same.

*map*: all rules are folded into one verdict map over (peer, protocol, port) for nft, or into one ``hash:net,port`` set
for iptables. This is the fastest form that can be written by hand for these rules, but no rule remains that could be
counted or logged.

In both forms, packets of connections that conntrack knows are accepted first, as in every such firewall. Invariant:
this module only makes text, which runs only inside namespaces of the laboratory (`bench/site.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address

from bench.policies import FlatRule, fold
from netpol_ebpf.policy.types import TCP, Direction

POD_CHAIN = "BENCH"
ONE_SET = "allowed"


def _protocol(number: int) -> str:
    return "tcp" if number == TCP else "udp"


def _range(ports: tuple[int, int], mark: str) -> str:
    return f"{ports[0]}{mark}{ports[1]}" if ports[0] != ports[1] else str(ports[0])


def _sides(direction: Direction) -> tuple[str, str]:
    """(the field with the endpoint's address, the field with the peer's address), for packets of a direction."""
    return ("daddr", "saddr") if direction is Direction.INGRESS else ("saddr", "daddr")


def _set_names(rules: Iterable[FlatRule]) -> dict[str, tuple[str, FlatRule]]:
    """Maps a label to (name of its set, a rule with it), for rules with several peers.

    Rules share sets, as in agents.
    """
    names: dict[str, tuple[str, FlatRule]] = {}
    for rule in rules:
        if len(rule.peers) != 1:
            names.setdefault(rule.label or rule.policy, (f"peers{len(names)}", rule))
    return names


# --- nftables -----------------------------------------------------------------------------------------------------------


def nft_rules(rules: Sequence[FlatRule], endpoint: IPv4Address, direction: Direction) -> str:
    """A file for ``nft -f`` in the form *rules*: one nft rule for each flat rule."""
    own, peer = _sides(direction)
    sets = _set_names(rules)
    lines = ["table ip bench {"]
    for name, rule in sets.values():
        elements = ", ".join(str(net) for net in rule.peers)
        content = f" elements = {{ {elements} }};" if elements else ""
        lines.append(f"set {name} {{ type ipv4_addr; flags interval;{content} }}")
    lines.append("chain pod {")
    for rule in rules:
        named = sets.get(rule.label or rule.policy)
        peers = f"@{named[0]}" if named is not None else str(rule.peers[0])
        ports = ", ".join(_range(ports, "-") for ports in rule.ports)
        lines.append(f"ip {peer} {peers} {_protocol(rule.protocol)} dport {{ {ports} }} accept")
    return "\n".join([*lines, "drop", "}", *_nft_hook(endpoint, own), "}", ""])


def nft_map(rules: Sequence[FlatRule], endpoint: IPv4Address, direction: Direction) -> str:
    """A file for ``nft -f`` in the form *map*: one verdict map."""
    own, peer = _sides(direction)
    elements = ",\n".join(
        f"{net} . {_protocol(protocol)} . {_range(ports, '-')} : accept"
        for (net, protocol), ranges in fold(rules).items()
        for ports in ranges
    )
    return "\n".join([
        "table ip bench {",
        "map allowed { type ipv4_addr . inet_proto . inet_service : verdict; flags interval;",
        f"elements = {{ {elements} }}",
        "}",
        f"chain pod {{\nip {peer} . meta l4proto . th dport vmap @allowed\ndrop\n}}",
        *_nft_hook(endpoint, own),
        "}",
        "",
    ])  # fmt: skip


def _nft_hook(endpoint: IPv4Address, own: str) -> list[str]:
    return [
        f"map pods {{ type ipv4_addr : verdict; elements = {{ {endpoint} : jump pod }}; }}",
        "chain forward {",
        "type filter hook forward priority filter; policy accept;",
        "ct state established,related accept",
        f"ip {own} vmap @pods",
        "}",
    ]


# --- iptables and ipset ---------------------------------------------------------------------------------------------------


def iptables_rules(rules: Sequence[FlatRule], endpoint: IPv4Address, direction: Direction) -> tuple[str, str]:
    """Input for ``ipset restore`` and for ``iptables-restore``, in the form *rules*: one rule for each flat rule."""
    sets = _set_names(rules)
    made = [line for name, rule in sets.values() for line in _ipset(name, "hash:net", (str(net) for net in rule.peers))]
    flag, side = ("-s", "src") if direction is Direction.INGRESS else ("-d", "dst")
    lines = []
    for rule in rules:
        named = sets.get(rule.label or rule.policy)
        peers = f"-m set --match-set {named[0]} {side}" if named is not None else f"{flag} {rule.peers[0]}"
        ports = ",".join(_range(ports, ":") for ports in rule.ports)
        match = f"--dport {ports}" if len(rule.ports) == 1 else f"-m multiport --dports {ports}"
        lines.append(f"-A {POD_CHAIN} {peers} -p {_protocol(rule.protocol)} {match} -j ACCEPT")
    return "\n".join([*made, ""]), _iptables_table(lines, endpoint, direction)


def iptables_set(rules: Sequence[FlatRule], endpoint: IPv4Address, direction: Direction) -> tuple[str, str]:
    """Input for ``ipset restore`` and for ``iptables-restore``, in the form *map*: one set."""
    elements = (
        f"{net},{_protocol(protocol)}:{_range(ports, '-')}"
        for (net, protocol), ranges in fold(rules).items()
        for ports in ranges
    )
    sides = "src,dst" if direction is Direction.INGRESS else "dst,dst"
    lines = [f"-A {POD_CHAIN} -m set --match-set {ONE_SET} {sides} -j ACCEPT"]
    return "\n".join([*_ipset(ONE_SET, "hash:net,port", elements), ""]), _iptables_table(lines, endpoint, direction)


def _ipset(name: str, kind: str, elements: Iterable[str]) -> Iterator[str]:
    yield f"create {name} {kind} maxelem 4194304"
    for element in elements:
        yield f"add {name} {element}"


def _iptables_table(lines: Iterable[str], endpoint: IPv4Address, direction: Direction) -> str:
    own = "-d" if direction is Direction.INGRESS else "-s"
    return "\n".join([
        "*filter",
        f":{POD_CHAIN} - [0:0]",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-A FORWARD {own} {endpoint} -j {POD_CHAIN}",
        *lines,
        f"-A {POD_CHAIN} -j DROP",
        "COMMIT",
        "",
    ])  # fmt: skip
