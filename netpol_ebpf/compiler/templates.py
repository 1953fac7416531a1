# SPDX-License-Identifier: Apache-2.0
"""The templates in use. A template is built when a rule list first needs it, and rebuilt when its inputs change.

Invariants: a template whose entries are the same after a rebuild stays the same object, so that its rule lists do not
change.  The matches of a template, and their terms, are acquired while a rule list has the template.  The named ports
and services on which a template depends are recorded while it is the current template of its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Union

from netpol_ebpf.compiler.entries import PortPair, RuleEntry
from netpol_ebpf.compiler.identities import IdentityIndex
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.compiler.limits import Limits, exceeded
from netpol_ebpf.compiler.owners import NameKey, OwnerIndex
from netpol_ebpf.compiler.rule_lists import (
    Exceptions,
    RuleList,
    Template,
    exception_entries,
    make_template,
    missing_profile_entries,
    policy_entries,
    profile_entries,
)
from netpol_ebpf.policy.types import Direction, LabelledNets, PolicyKey, ServiceBackends, World
from netpol_ebpf.selector import Selector

ServiceKey = tuple[str, str]
TemplateKey = tuple[Union[PolicyKey, str, Exceptions], Direction]
"""The key of a template: (a policy's key, a profile's name, or the exceptions of a host; the direction)."""
_Watched = tuple[frozenset[NameKey], frozenset[ServiceKey]]


def service_ports(service: ServiceBackends | None) -> frozenset[PortPair]:
    """Every (protocol, port) of a service's backends."""
    return frozenset() if service is None else frozenset((each.protocol, each.port) for each in service.backends)


def service_key(old: ServiceBackends | None, new: ServiceBackends | None) -> ServiceKey:
    """The key of a service that changed from ``old`` to ``new``. One of them may be None."""
    service = new or old
    if service is None:
        raise AssertionError("a change from nothing to nothing")
    return (service.namespace, service.name)


class _RecordingResolver:
    """A resolver that records each named port and service that is looked up, and acquires the named ports."""

    def __init__(
        self,
        owners: OwnerIndex,
        services: Mapping[ServiceKey, ServiceBackends],
        named_sets: Mapping[str, LabelledNets],
        journal: Journal,
    ) -> None:
        self._owners = owners
        self._services = services
        self._named_sets = named_sets
        self._journal = journal
        self.names: set[NameKey] = set()
        self.services: set[ServiceKey] = set()

    def named(self, selector: Selector | None, name: str) -> Iterable[PortPair]:
        key = (selector, name)
        if key not in self.names:
            self.names.add(key)
            self._owners.acquire_name(key, self._journal)
        return self._owners.named(key)

    def service(self, namespace: str, name: str) -> Iterable[PortPair]:
        key = (namespace, name)
        self.services.add(key)
        return service_ports(self._services.get(key))

    def domains(self, selector: Selector) -> frozenset[str]:
        """The patterns of the selected network sets. `Intake` finds the rules that depend on them by itself."""
        return frozenset().union(*(held.domains for held in self._named_sets.values() if selector.matches(held.labels)))


class Templates:
    """The current template of each key, for the objects of one world."""

    def __init__(self, world: World, owners: OwnerIndex, identities: IdentityIndex, limits: Limits) -> None:
        self._world = world
        self._owners = owners
        self._identities = identities
        self._limits = limits
        self.named_sets: dict[str, LabelledNets] = {}
        """The network sets with domain names, by key. `Intake` keeps them up to date."""
        self._current: dict[TemplateKey, Template] = {}
        self._watched: dict[TemplateKey, _Watched] = {}
        self._by_name: dict[NameKey, set[TemplateKey]] = {}
        self._by_service: dict[ServiceKey, set[TemplateKey]] = {}
        self._rule_lists: dict[RuleList, int] = {}
        self._idle: set[TemplateKey] = set()
        self._keys: dict[Template, TemplateKey] = {}

    def get(self, key: TemplateKey, journal: Journal) -> Template:
        """The current template of a key, built if it does not exist.

        Raises LimitError if the object has too many rules.
        """
        template = self._current.get(key)
        if template is None:
            template, watched = self._build(key, journal)
            self._keep(key, template, watched, journal)
            journal.add(self._idle, key)
        return template

    def refresh(self, key: TemplateKey, journal: Journal) -> bool:
        """Rebuild the template of a key after its object, named ports or services may have changed.

        Returns whether the template changed.
        """
        before = self._current.get(key)
        if before is None:
            return False
        if not self._exists(key):
            self._forget(key, journal)
            return True
        template, watched = self._build(key, journal)
        same = template.entries == before.entries and template.what == before.what
        self._forget(key, journal)
        self._keep(key, before if same else template, watched, journal)
        journal.add(self._idle, key)
        return not same

    def depending_on(self, names: Iterable[NameKey], services: Iterable[ServiceKey]) -> Iterator[TemplateKey]:
        """The keys of templates that depend on one of the named ports ``names`` or of the ``services``."""
        for name in names:
            yield from self._by_name.get(name, ())
        for service in services:
            yield from self._by_service.get(service, ())

    def acquire(self, rule_list: RuleList, journal: Journal) -> None:
        """Add a reference to a rule list. The first reference acquires the rule list's templates and their matches."""
        references = self._rule_lists.get(rule_list, 0)
        journal.put(self._rule_lists, rule_list, references + 1)
        if references:
            return
        for use in rule_list.uses():
            template = use.template
            if not template.references:
                identities = self._identities
                peers = tuple(identities.acquire_match(entry.peer, journal) for entry in template.entries)
                owns = tuple(identities.acquire_match(entry.own, journal) for entry in template.entries)
                journal.assign(template, "peers", peers)
                journal.assign(template, "owns", owns)
            journal.assign(template, "references", template.references + 1)

    def release(self, rule_list: RuleList, journal: Journal) -> None:
        """Drop a reference to a rule list. The last reference releases the rule list's templates and their matches."""
        references = self._rule_lists[rule_list]
        if references > 1:
            journal.put(self._rule_lists, rule_list, references - 1)
            return
        journal.pop(self._rule_lists, rule_list)
        for use in rule_list.uses():
            template = use.template
            journal.assign(template, "references", template.references - 1)
            if not template.references:
                for record in (*template.peers, *template.owns):
                    self._identities.release_match(record, journal)
                journal.assign(template, "peers", ())
                journal.assign(template, "owns", ())
                key = self._keys.get(template)
                if key is not None:
                    journal.add(self._idle, key)

    def collect(self, journal: Journal) -> None:
        """Remove templates that no rule list has. Must be called at the end of a commit."""
        for key in list(self._idle):
            journal.discard(self._idle, key)
            template = self._current.get(key)
            # A template without entries is in no rule list, but is kept while its object exists.
            if template is not None and not template.references and (template.entries or not self._exists(key)):
                self._forget(key, journal)

    def _exists(self, key: TemplateKey) -> bool:
        """Whether the template's policy exists.

        Always true for a profile, always false for the exceptions of a host.
        """
        subject = key[0]
        if isinstance(subject, PolicyKey):
            return subject in self._world.policies
        return not isinstance(subject, Exceptions)

    def _build(self, key: TemplateKey, journal: Journal) -> tuple[Template, _Watched]:
        subject, direction = key
        resolver = _RecordingResolver(self._owners, self._world.services, self.named_sets, journal)
        entries: list[RuleEntry]
        if isinstance(subject, PolicyKey):
            what = str(subject)
            policy = self._world.policies[subject]
            if len(policy.rules(direction)) > self._limits.rules_per_policy:
                raise exceeded(what, "rules_per_policy", self._limits.rules_per_policy, len(policy.rules(direction)))
            entries = policy_entries(policy, direction, resolver)
        elif isinstance(subject, Exceptions):
            what = f"failsafes and tunnels, {direction.value}"
            entries = exception_entries(subject, direction, resolver)
        else:
            what = f"Profile/{subject}"
            profile = self._world.profiles.get(subject)
            if profile is None:
                entries = missing_profile_entries(subject, direction, resolver)
            else:
                entries = profile_entries(profile, direction, resolver)
        return make_template(what, entries), (frozenset(resolver.names), frozenset(resolver.services))

    def _keep(self, key: TemplateKey, template: Template, watched: _Watched, journal: Journal) -> None:
        journal.put(self._current, key, template)
        journal.put(self._keys, template, key)
        journal.put(self._watched, key, watched)
        for name in watched[0]:
            journal.add_to(self._by_name, name, key)
        for service in watched[1]:
            journal.add_to(self._by_service, service, key)

    def _forget(self, key: TemplateKey, journal: Journal) -> None:
        template = journal.pop(self._current, key)
        journal.pop(self._keys, template)
        names, services = journal.pop(self._watched, key)
        for name in names:
            journal.discard_from(self._by_name, name, key)
            self._owners.release_name(name, journal)
        for service in services:
            journal.discard_from(self._by_service, service, key)
