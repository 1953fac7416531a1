# SPDX-License-Identifier: Apache-2.0
"""Addresses of several workloads: which one has the claim, and when the claim passes to another."""

from __future__ import annotations

import itertools
from ipaddress import ip_address

from netpol_ebpf.agent.claims import AddressClaims
from netpol_ebpf.policy.types import Changes, Endpoint, EndpointKey, EndpointKind, World

A, B, C = (EndpointKey("Pod", "shop", name) for name in "abc")
ONE, TWO = ip_address("10.0.0.1"), ip_address("10.0.0.2")


class Cluster:
    """A world and its claims. Each step is one change of the manifests."""

    def __init__(self) -> None:
        self.world = World()
        self.claims = AddressClaims(self.world)
        self.seen: dict[EndpointKey, tuple[object, ...]] = {}

    def change(self, older: tuple[EndpointKey, ...] = (), **addresses: tuple[object, ...] | None) -> None:
        changes = Changes()
        for name, own in addresses.items():
            key = EndpointKey("Pod", "shop", name)
            changes.endpoints[key] = (
                None if own is None else Endpoint(key, EndpointKind.WORKLOAD, {"app": name}, own)  # type: ignore[arg-type]
            )
        changes.apply_to(self.world)
        self.claims.apply_changes(changes, older)
        for key, endpoint in changes.endpoints.items():
            if endpoint is None:
                self.seen.pop(key, None)
            else:
                self.seen[key] = endpoint.addresses

    def check(self, **addresses: tuple[object, ...]) -> None:
        """Check that both the changes so far and the whole world give these claims."""
        expected = {EndpointKey("Pod", "shop", name): own for name, own in addresses.items()}
        assert self.seen == expected
        whole = {key: one.addresses for key, one in self.claims.effective_world().endpoints.items()}
        assert whole == expected


def test_the_first_has_it_and_the_next_gets_it() -> None:
    """The newer endpoint lacks the address and gets a problem.

    It gets the address as soon as the older one gives it up.
    """
    cluster = Cluster()
    cluster.change(a=(ONE,))
    cluster.change(b=(ONE, TWO))
    cluster.check(a=(ONE,), b=(TWO,))
    assert list(cluster.claims.disputes()) == [(ONE, A, B)]
    assert cluster.claims.is_contested(A)
    cluster.change(a=None)
    cluster.check(b=(ONE, TWO))
    assert list(cluster.claims.disputes()) == []
    assert cluster.claims.holder(ONE) == B


def test_an_address_passes_on_within_one_change() -> None:
    """If a pod is removed and another one with its address is added in the same change, there is no conflict."""
    for names in itertools.permutations(("a", "b")):
        cluster = Cluster()
        cluster.change(a=(ONE,))
        moves: dict[str, tuple[object, ...] | None] = {"a": None, "b": (ONE,)}
        cluster.change((), **{name: moves[name] for name in names})
        cluster.check(b=(ONE,))
        assert list(cluster.claims.disputes()) == []


def test_after_a_restart_the_known_are_older() -> None:
    """Of pods that appear together, those that an earlier agent knew come first; otherwise the names decide."""
    cluster = Cluster()
    cluster.change(older=(B,), a=(ONE,), b=(ONE,), c=(ONE,))
    cluster.check(a=(), b=(ONE,), c=())
    assert list(cluster.claims.disputes()) == [(ONE, B, A), (ONE, B, C)]


def test_a_change_of_labels_keeps_the_place() -> None:
    """An endpoint that changes in other ways stays the older one, and a loser that changes stays the loser."""
    cluster = Cluster()
    cluster.change(a=(ONE,))
    cluster.change(b=(ONE,))
    cluster.change(a=(ONE, TWO))
    cluster.change(b=(ONE,))
    cluster.check(a=(ONE, TWO), b=())


def test_nothing_is_left_of_what_went() -> None:
    """After the removal of all endpoints, the claims are empty."""
    cluster = Cluster()
    cluster.change(a=(ONE, TWO), b=(ONE,))
    cluster.change(b=(TWO,))
    cluster.change(a=None)
    cluster.check(b=(TWO,))
    cluster.change(b=None)
    assert (cluster.claims._holders, cluster.claims._others, cluster.claims._addresses) == ({}, {}, {})


def test_lent_addresses_count_until_the_object_has_one() -> None:
    """A workload has the addresses lent to it, with the same order of claims, until its object has one of them."""
    cluster = Cluster()
    cluster.change(a=(ONE,), b=(), c=())
    assert cluster.claims.lend(B, (ONE, TWO))
    assert not cluster.claims.lend(B, (ONE, TWO))
    cluster.change(b=())
    cluster.check(a=(ONE,), b=(TWO,), c=())
    assert list(cluster.claims.disputes()) == [(ONE, A, B)]
    cluster.change(a=None)
    cluster.check(b=(ONE, TWO), c=())
    cluster.change(b=(TWO,))
    cluster.check(b=(TWO,), c=())
    assert cluster.claims.holder(ONE) is None
    cluster.change(b=(ip_address("10.0.0.3"),))
    cluster.check(b=(ONE, TWO), c=())
    cluster.change(b=())
    cluster.check(b=(ONE, TWO), c=())
    assert cluster.claims.lend(B, ())
    cluster.change(b=())
    cluster.check(b=(), c=())
    assert [*cluster.claims.borrowers] == []


def test_a_lent_address_passes_from_who_has_no_interface() -> None:
    """An address that the runtime gave to one pod is not that of another pod with an older object.

    With an interface it stays.
    """
    cluster = Cluster()
    cluster.change(a=(ONE,), b=())
    assert cluster.claims.lend(B, (ONE,))
    cluster.change(b=())
    cluster.check(a=(ONE,), b=())
    changes = Changes(endpoints={B: cluster.world.endpoints[B]})
    cluster.claims.apply_changes(changes, is_idle=lambda key: key == A)
    assert {key: one and one.addresses for key, one in changes.endpoints.items()} == {A: (), B: (ONE,)}
    assert list(cluster.claims.disputes()) == [(ONE, B, A)]
    cluster.seen = {A: (), B: (ONE,)}
    cluster.change(b=None)
    cluster.check(a=(ONE,))
