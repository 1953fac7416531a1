# SPDX-License-Identifier: Apache-2.0
"""Decides which workload holds an address that several workloads claim.

The first workload to claim an address holds it. For the other claimants the address does not count: rules do not match
them by it, they may not send from it, and a workload without any other address stays closed. So a new pod never gets
permissions meant for the former holder of its address, and an old pod never loses its address to a later manifest. The
container runtime may assign an address before the Pod object has it; such an address is *lent* to the pod.

Invariants: at most one workload holds an address. A holder loses an address only in two cases: its object gives it up,
or the holder has no interface and the runtime assigned the address to another pod. After a restart, workloads that an
earlier agent knew count as older than all others. This module does not know interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from netpol_ebpf.policy.types import Changes, Endpoint, EndpointKey, EndpointKind, IPAddress, World


class AddressClaims:
    """The holders of workloads' addresses. Each change of ``world`` must be followed by a call of `apply_changes`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holders: dict[IPAddress, EndpointKey] = {}
        self._others: dict[IPAddress, list[EndpointKey]] = {}  # other claimants of each contested address, oldest first
        self._addresses: dict[EndpointKey, tuple[IPAddress, ...]] = {}  # the addresses that each endpoint claims
        self._lent: dict[EndpointKey, tuple[IPAddress, ...]] = {}

    @property
    def borrowers(self) -> Collection[EndpointKey]:
        """The endpoints to which `lend` lent addresses; read-only for callers."""
        return self._lent.keys()

    def lend(self, key: EndpointKey, addresses: tuple[IPAddress, ...]) -> bool:
        """Lend addresses to an endpoint until its object has one of them; () ends the loan.

        Returns whether the loan changed. If it did, the caller must call `apply_changes`.
        """
        if self._lent.get(key, ()) == addresses:
            return False
        if addresses:
            self._lent[key] = addresses
        else:
            del self._lent[key]
        return True

    def apply_changes(
        self,
        changes: Changes,
        older: Collection[EndpointKey] = (),
        is_idle: Callable[[EndpointKey], bool] = lambda _key: False,
    ) -> None:
        """Update the claims, and reduce the endpoints in ``changes`` to the addresses that they hold.

        The world must already contain the changes. Endpoints whose addresses change as a consequence are added to
        ``changes``. ``older``: endpoints that count as older than the other new endpoints. ``is_idle``: returns whether
        an endpoint of this node has no interface. The address in the object of such an endpoint may be out of date, so
        the endpoint loses the address to a pod to which the runtime assigned it. Cost: linear in the changed endpoints
        and in the claimants of their addresses.
        """
        touched: dict[EndpointKey, None] = {}
        # Old claims end before new ones begin, because one change may move an address to another endpoint.
        for key in changes.endpoints:
            wanted = self._wanted(key)
            for address in set(self._addresses.get(key, ())) - set(wanted):
                touched |= dict.fromkeys(self._give_up(key, address))
        for key in sorted(changes.endpoints, key=lambda key: (key not in older, key)):
            wanted = self._wanted(key)
            for address in wanted:
                holder = self._holders.setdefault(address, key)
                if holder != key and address in self._lent.get(key, ()) and is_idle(holder):
                    line = [holder, *(one for one in self._others.get(address, ()) if one != key)]
                    self._holders[address], self._others[address] = key, line
                    touched[holder] = None
                elif holder != key:
                    line = self._others.setdefault(address, [])
                    if key not in line:
                        line.append(key)
            if wanted:
                self._addresses[key] = wanted
            else:
                self._addresses.pop(key, None)
            touched[key] = None
        if self._others or self._lent or len(touched) > len(changes.endpoints):
            changes.endpoints.update({key: self.effective(key) for key in touched})

    def effective(self, key: EndpointKey) -> Endpoint | None:
        """The endpoint with only the addresses that it holds; None if the endpoint does not exist."""
        endpoint = self._world.endpoints.get(key)
        if endpoint is None or not (self.is_contested(key) or key in self._lent):
            return endpoint
        own = tuple(address for address in self._wanted(key) if self._holders[address] == key)
        return endpoint if own == endpoint.addresses else replace(endpoint, addresses=own)

    def effective_world(self) -> World:
        """The world in which every workload has only the addresses that it holds; read-only for callers."""
        others = {key for line in self._others.values() for key in line} | self._lent.keys()
        if not others:
            return self._world
        changed = {key: endpoint for key in others if (endpoint := self.effective(key)) is not None}
        return replace(self._world, endpoints={**self._world.endpoints, **changed})

    def holder(self, address: IPAddress) -> EndpointKey | None:
        """The workload that holds an address; None if no workload claims the address."""
        return self._holders.get(address)

    def is_contested(self, key: EndpointKey) -> bool:
        """Whether another workload claims one of this workload's addresses."""
        return any(address in self._others for address in self._addresses.get(key, ()))

    def disputes(self) -> Iterator[tuple[IPAddress, EndpointKey, EndpointKey]]:
        """Every contested address, sorted, as (address, holder, other claimant), once for each other claimant."""
        for address in sorted(self._others, key=lambda address: (address.version, address.packed)):
            for other in self._others[address]:
                yield address, self._holders[address], other

    def _wanted(self, key: EndpointKey) -> tuple[IPAddress, ...]:
        endpoint = self._world.endpoints.get(key)
        if endpoint is None or endpoint.kind is not EndpointKind.WORKLOAD:
            return ()
        lent = self._lent.get(key, ())
        return lent if lent and set(lent).isdisjoint(endpoint.addresses) else endpoint.addresses

    def _give_up(self, key: EndpointKey, address: IPAddress) -> list[EndpointKey]:
        """Remove a workload's claim to an address. Returns the remaining claimants; the first of them now holds it."""
        line = [self._holders.pop(address), *self._others.pop(address, ())]
        line.remove(key)
        if line:
            self._holders[address] = line[0]
        if line[1:]:
            self._others[address] = line[1:]
        return line
