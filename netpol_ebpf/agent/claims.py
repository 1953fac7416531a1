# SPDX-License-Identifier: Apache-2.0
"""The holder of an address that several workloads claim.

The first workload to claim an address holds it. For the others the address does not count: policy does not know them by
it, they may not send from it, and a workload without any other address stays closed.  So a new pod never inherits what
an address was allowed before, and an old pod never loses its address to whoever writes it into a manifest.

The container runtime may assign an address before the objects say so: such an address is *lent* to the pod.

Invariants: at most one workload holds an address; the holder loses it only by giving it up or, while it has no
interface, to the pod that the runtime gave it to.  After a restart the workloads that an earlier agent knew count as
older.  Knows nothing of interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from netpol_ebpf.policy.types import Changes, Endpoint, EndpointKey, EndpointKind, IPAddress, World


class AddressClaims:
    """Addresses of the workloads of a world. ``world`` is read whenever something of it changed (`apply_changes`)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holders: dict[IPAddress, EndpointKey] = {}
        self._others: dict[IPAddress, list[EndpointKey]] = {}  # of contested addresses: who claims it too, oldest first
        self._addresses: dict[EndpointKey, tuple[IPAddress, ...]] = {}  # as claimed
        self._lent: dict[EndpointKey, tuple[IPAddress, ...]] = {}

    @property
    def borrowers(self) -> Collection[EndpointKey]:
        """Endpoints that `lend` gave addresses; read-only for callers."""
        return self._lent.keys()

    def lend(self, key: EndpointKey, addresses: tuple[IPAddress, ...]) -> bool:
        """Lend addresses to an endpoint until its object has one of them, () for none.

        Returns whether something changed, so that `apply_changes` must be called.
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
        """Update the claims from ``changes``, and put the endpoints with their effective addresses into ``changes``.

        ``older``: of the endpoints that appear now, those that existed first.  ``is_idle``: whether an endpoint of this
        node has no interface; its object's address is then out of date and passes to the pod that the runtime lent it
        to.  The world must be that after the changes. Cost: linear in the changed endpoints and those that claim the
        same addresses.
        """
        touched: dict[EndpointKey, None] = {}
        # What goes makes room before what comes claims it: an address may pass from one to another in one change.
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
        """The endpoint with the addresses that count as its own; None when there is no such endpoint."""
        endpoint = self._world.endpoints.get(key)
        if endpoint is None or not (self.is_contested(key) or key in self._lent):
            return endpoint
        own = tuple(address for address in self._wanted(key) if self._holders[address] == key)
        return endpoint if own == endpoint.addresses else replace(endpoint, addresses=own)

    def effective_world(self) -> World:
        """The world in which every workload has the addresses that count as its own; to be read only."""
        others = {key for line in self._others.values() for key in line} | self._lent.keys()
        if not others:
            return self._world
        changed = {key: endpoint for key in others if (endpoint := self.effective(key)) is not None}
        return replace(self._world, endpoints={**self._world.endpoints, **changed})

    def holder(self, address: IPAddress) -> EndpointKey | None:
        """The workload that has an address."""
        return self._holders.get(address)

    def is_contested(self, key: EndpointKey) -> bool:
        """Whether another workload claims an address of this one."""
        return any(address in self._others for address in self._addresses.get(key, ()))

    def disputes(self) -> Iterator[tuple[IPAddress, EndpointKey, EndpointKey]]:
        """Contested addresses in order: (address, holder, other claimant)."""
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
        """Remove a workload's claim of an address; returns the workloads that may hold it now."""
        line = [self._holders.pop(address), *self._others.pop(address, ())]
        line.remove(key)
        if line:
            self._holders[address] = line[0]
        if line[1:]:
            self._others[address] = line[1:]
        return line
