# SPDX-License-Identifier: Apache-2.0
"""From the DNS answer to the verdict: what an answer teaches decides the endpoint's next packet."""

from __future__ import annotations

from collections.abc import Iterator

import dns_messages as d
import packets as p
import pytest
from dns_scene import EXACT, WILD, DnsScene
from rig import ALLOW, DENY, POD4, POD6, PolicySet, Rig, Verdict, everything

from netpol_loader import abi

pytestmark = pytest.mark.kernel

LIST, DNS, END, BY_NAME, BY_CHAIN = 5, 12, 13, 30, 31
"""A domain list, and rules: DNS is allowed, the end of the tier, a rule with www.example.com and one with *.cdn.net."""
SITES = pytest.mark.parametrize(
    ("pod", "kind", "site"), [(POD4, d.A, "203.0.113.5"), (POD6, d.AAAA, "2001:db8::5")], ids=["ipv4", "ipv6"]
)


@pytest.fixture
def scene(rig: Rig) -> Iterator[DnsScene]:
    """A pod that may ask DNS servers, and otherwise send only to names."""
    one = DnsScene(rig)
    rig.atom(abi.NP_SLOT_UDP * 256, 53, 9)
    rig.l4_class(3, 9, 1)
    verdicts = [Verdict(DENY, END, domain_list=LIST), Verdict(ALLOW, DNS)]
    rig.pod(everything(1, ALLOW, 11), PolicySet(3, verdicts, l4_classes=2))
    rig.domain(LIST, EXACT, BY_NAME, rank=1)
    rig.epoch()
    yield one
    one.close()


def first(scene: DnsScene, pod: str, site: str, port: int) -> int:
    """The rule that decides a new connection to an address."""
    (rule,) = scene.rig.out(p.frame(pod, site, p.TCP, p.tcp(port, 443))).rules
    return rule


@SITES
def test_first_packet_after_the_answer_is_allowed(scene: DnsScene, pod: str, kind: int, site: str) -> None:
    """The address is denied until the answer came, and allowed at once afterwards; a name of no rule allows nothing."""
    assert first(scene, pod, site, 1) == END
    scene.exchange(d.Message("other.example.com", kind=kind), d.address(site))
    assert first(scene, pod, site, 2) == END
    scene.exchange(d.Message(kind=kind), d.address(site))
    assert first(scene, pod, site, 3) == BY_NAME


@SITES
def test_every_name_of_the_chain_counts(scene: DnsScene, pod: str, kind: int, site: str) -> None:
    """A rule with a name that a CNAME led to allows the address too; the rule that comes first decides."""
    chain = (d.cname("a.cdn.net"), d.address(site, owner="a.cdn.net"))
    scene.rig.domain(LIST, WILD, BY_CHAIN, rank=2)
    scene.exchange(d.Message(kind=kind), *chain)
    assert first(scene, pod, site, 1) == BY_NAME
    scene.rig.domain(LIST, WILD, BY_CHAIN, rank=0)
    assert first(scene, pod, site, 2) == BY_CHAIN
