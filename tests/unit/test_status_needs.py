# SPDX-License-Identifier: Apache-2.0
"""The index of who needs what answers as the plain test of every policy on every endpoint does."""

from __future__ import annotations

import random
from ipaddress import ip_address

from netpol_ebpf.policy.types import Direction, Endpoint, EndpointKey, EndpointKind, Policy, PolicyKey
from netpol_ebpf.selector import parse
from netpol_ebpf.status.needs import Needs, nodes_needing

SELECTORS = ("all()", "a == 'x'", "a in {'x', 'y'} && has(b)", "!has(b)", "b != 'x'")
ADDRESS = (ip_address("10.0.0.1"),)


def endpoint(key: EndpointKey, chance: random.Random) -> Endpoint:
    labels = {name: chance.choice("xyz") for name in "ab" if chance.random() < 0.7}
    node = chance.choice(["n1", "n2", "n3", None])
    if key.kind == "HostEndpoint":
        return Endpoint(key, EndpointKind.HOST, labels, (), node=node, interface="eth0")
    return Endpoint(key, EndpointKind.WORKLOAD, labels, chance.choice([ADDRESS, ()]), node=node)


def test_index_is_the_plain_test() -> None:
    """After each of many changes, in any order: a workload without an address and an endpoint without a node need nothing."""
    chance = random.Random(7)
    needs = Needs()
    policies: dict[PolicyKey, Policy] = {}
    endpoints: dict[EndpointKey, Endpoint] = {}
    kinds = ("Pod", "HostEndpoint")
    found: set[int] = set()
    for _ in range(600):
        if chance.random() < 0.3:
            key = PolicyKey("NetworkPolicy", "ns", f"p{chance.randrange(8)}")
            if key in policies and chance.random() < 0.4:
                del policies[key]
            else:
                selector = parse(chance.choice(SELECTORS))
                policies[key] = Policy(key, "default", 1.0, selector, frozenset({Direction.INGRESS}))
            needs.set_policy(key, policies.get(key))
        else:
            kind = chance.choice(kinds)
            name = EndpointKey(kind, "", f"e{chance.randrange(12)}")
            if name in endpoints and chance.random() < 0.4:
                del endpoints[name]
            else:
                endpoints[name] = endpoint(name, chance)
            needs.set_endpoint(name, endpoints.get(name))
        for key, policy in policies.items():
            wanted = nodes_needing(policy, endpoints.values())
            assert needs.nodes(key) == wanted
            found.add(len(wanted))
        for name, one in endpoints.items():
            is_known = name in needs._places
            assert is_known == (one.node is not None and (name.kind == "HostEndpoint" or one.addresses == ADDRESS))
    assert found == {0, 1, 2, 3}
    for name in list(endpoints):
        needs.set_endpoint(name, None)
    assert not needs._nodes
