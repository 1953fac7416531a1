# SPDX-License-Identifier: Apache-2.0
"""Calico policy judged straight from the YAML, by the words of SEMANTICS 1.4 to 1.11, 2.6 and 3.

It shares nothing with the product but the parser of selector expressions.  In particular a namespace selector is evaluated
on the namespace's own labels, not on prefixed copies, and an entity is judged owner by owner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Optional

from kubernetes_oracle import Cluster, Manifest

from netpol_ebpf.selector import EVERYTHING, negate, parse

NUMBERS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
BUILT_IN = {"default": (1e6, "Deny"), "kube-admin": (1e3, "Pass"), "kube-baseline": (1e7, "Pass")}
NAMESPACE = "projectcalico.org/namespace"


@dataclass(frozen=True)
class Probe:
    """A first packet; ICMP probes are echo requests of the right family."""

    source: str
    destination: str
    protocol: int
    source_port: int
    destination_port: int
    icmp_type: int = 0

    @property
    def version(self) -> int:
        """The address family."""
        return 6 if ":" in self.source else 4


@dataclass
class Owner:
    """A pod, host endpoint or network set."""

    labels: dict[str, str]
    nets: list[str]
    kind: str
    name: str
    namespace: str = ""
    account: str = ""
    namespace_labels: dict[str, str] = field(default_factory=dict)
    account_labels: dict[str, str] = field(default_factory=dict)
    ports: list[tuple[str, int, int]] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)
    manifest: Manifest = field(default_factory=dict)

    def owns(self, address: str) -> bool:
        """Whether one of its nets or addresses holds the address."""
        return any(ip_address(address) in ip_network(net) for net in self.nets)


def _holds(text: str, labels: dict[str, str], *, everything: bool = True) -> bool:
    """A selector on labels; ``everything``: what all() says here."""
    return parse(text).with_all_as(EVERYTHING if everything else negate(EVERYTHING)).matches(labels)


class CalicoCluster:
    """One cluster state, asked for the verdict of one endpoint, direction and stage."""

    def __init__(self, manifests: list[Manifest]) -> None:
        def of(kind: str) -> list[Manifest]:
            return [item for item in manifests if item["kind"] == kind]

        self.kubernetes = _KubernetesCluster(manifests, self)
        self.profiles = {item["metadata"]["name"]: item["spec"] for item in of("Profile")}
        self.tiers = dict(BUILT_IN)
        for tier in of("Tier"):
            spec = tier["spec"]
            self.tiers[tier["metadata"]["name"]] = (spec.get("order", 1e6), spec.get("defaultAction", "Deny"))
        self.accounts = {
            (item["metadata"]["namespace"], item["metadata"]["name"]): {
                **item["metadata"]["labels"],
                "projectcalico.org/name": item["metadata"]["name"],
            }
            for item in of("ServiceAccount")
        }
        self.slices = of("EndpointSlice")
        self.policies = [*of("NetworkPolicy"), *of("GlobalNetworkPolicy")]
        self.pods = [self._pod(pod) for pod in self.kubernetes.pods]
        self.hosts = [self._host(host) for host in of("HostEndpoint")]
        self.sets = [self._set(item) for item in (*of("NetworkSet"), *of("GlobalNetworkSet"))]

    def _namespace_labels(self, namespace: str) -> dict[str, str]:
        return {**self.kubernetes.namespaces[namespace], "projectcalico.org/name": namespace} if namespace else {}

    def _pod(self, pod: Manifest) -> Owner:
        namespace = pod["metadata"]["namespace"]
        account = pod["spec"].get("serviceAccountName", "default")
        ips = [entry["ip"] for entry in pod["status"]["podIPs"]]
        return Owner(
            labels={**pod["metadata"]["labels"], NAMESPACE: namespace},
            nets=ips,
            kind="Pod",
            name=pod["metadata"]["name"],
            namespace=namespace,
            account=account,
            namespace_labels=self._namespace_labels(namespace),
            account_labels=self.accounts.get((namespace, account), {}),
            ports=[(name, NUMBERS[protocol], port) for name, protocol, port in self.kubernetes.pod_ports(ips[0])],
            manifest=pod,
        )

    def _host(self, host: Manifest) -> Owner:
        spec = host["spec"]
        labels: dict[str, str] = {}
        for profile in reversed(spec.get("profiles", [])):
            labels.update(self.profiles.get(profile, {}).get("labelsToApply", {}))
        return Owner(
            labels={**labels, **host["metadata"]["labels"]},
            nets=spec.get("expectedIPs", []),
            kind="HostEndpoint",
            name=host["metadata"]["name"],
            ports=[(port["name"], NUMBERS[port["protocol"]], port["port"]) for port in spec.get("ports", [])],
            profiles=spec.get("profiles", []),
        )

    def _set(self, item: Manifest) -> Owner:
        namespace = item["metadata"].get("namespace", "")
        labels = dict(item["metadata"]["labels"])
        if namespace:
            labels[NAMESPACE] = namespace
        return Owner(
            labels=labels,
            nets=item["spec"]["nets"],
            kind="set",
            name=item["metadata"]["name"],
            namespace=namespace,
            namespace_labels=self._namespace_labels(namespace),
        )

    # --- the verdict ------------------------------------------------------------------------------------------------

    def decide(self, owner: Owner, direction: str, stage: str, probe: Probe) -> tuple[str, str]:
        """What is decided (allow, deny, continue) and by whom: ``policy/index``, ``tier/end``, ``profile/index``."""
        chosen = [policy for policy in self.policies if self._applies(policy, owner, direction, stage)]
        tiers = {policy["spec"].get("tier", "default") for policy in chosen}
        for tier in sorted(tiers, key=lambda name: (name not in self.tiers, self.tiers.get(name, (0, ""))[0], name)):
            members = [policy for policy in chosen if policy["spec"].get("tier", "default") == tier]
            decision = self._tier(sorted(members, key=_sort_key), direction, probe)
            if decision in ("Allow", "Deny"):
                raise AssertionError(decision)
            if decision.startswith(("allow ", "deny ")):
                outcome, by = decision.split(" ")
                return outcome, by
            ends_in_pass = self.tiers.get(tier, (0, "Deny"))[1] == "Pass" or stage in ("pre-dnat", "untracked")
            if decision == "end" and not ends_in_pass:
                return "deny", f"{tier}/end"
        if stage != "normal":
            return "continue", ""
        return self._profiles(owner, direction, probe)

    def _tier(self, policies: list[Manifest], direction: str, probe: Probe) -> str:
        """``allow by``, ``deny by``, ``pass``, or ``end`` when nothing matched."""
        for policy in policies:
            name = policy["metadata"]["name"]
            if policy["apiVersion"].startswith("networking"):
                index = self.kubernetes.matching_rule(policy, direction.capitalize(), self.kubernetes.simple(probe))
                if index is not None:
                    return f"allow {name}/{index}"
                continue
            namespace = policy["metadata"].get("namespace", "")
            for index, rule in enumerate(policy["spec"].get(direction, [])):
                if rule["action"] != "Log" and self._matches(rule, namespace, direction, probe):
                    return "pass" if rule["action"] == "Pass" else f"{rule['action'].lower()} {name}/{index}"
        return "end"

    def _profiles(self, owner: Owner, direction: str, probe: Probe) -> tuple[str, str]:
        if owner.kind == "Pod":
            return "allow", f"kns.{owner.namespace}/0"
        for name in owner.profiles:
            if name == "projectcalico-default-allow":
                return "allow", f"{name}/0"
            if name not in self.profiles:
                return "deny", f"{name}/-1"
            for index, rule in enumerate(self.profiles[name].get(direction, [])):
                if rule["action"] != "Log" and self._matches(rule, "", direction, probe):
                    return "allow" if rule["action"] == "Allow" else "deny", f"{name}/{index}"
        return "deny", ""

    # --- which policies apply ---------------------------------------------------------------------------------------

    def _applies(self, policy: Manifest, owner: Owner, direction: str, stage: str) -> bool:
        if policy["apiVersion"].startswith("networking"):
            if owner.kind != "Pod" or stage != "normal":
                return False
            return self.kubernetes.selects(policy, owner.manifest, direction.capitalize())
        spec = policy["spec"]
        special = "pre-dnat" if spec.get("preDNAT") else "untracked" if spec.get("doNotTrack") else "normal"
        if owner.kind == "Pod":
            of_stage = special == stage == "normal"
        elif stage == "forward":
            of_stage = special == "normal" and bool(spec.get("applyOnForward"))
        else:
            of_stage = special == stage
        types = spec.get("types") or [
            *(["Ingress"] if spec.get("ingress") or not spec.get("egress") else []),
            *(["Egress"] if spec.get("egress") else []),
        ]
        return of_stage and direction.capitalize() in types and self._is_subject(policy, owner)

    def _is_subject(self, policy: Manifest, owner: Owner) -> bool:
        spec, namespace = policy["spec"], policy["metadata"].get("namespace", "")
        if namespace and owner.namespace != namespace:
            return False
        has_namespace = bool(owner.namespace)
        confined = "namespaceSelector" in spec
        selector = spec.get("selector", "")
        # In a global policy an all() that is written beside a namespaceSelector asks for a namespace, else beside a
        # serviceAccountSelector for an account; an empty selector asks for nothing.
        by_account = not namespace and not confined and "serviceAccountSelector" in spec
        everything = has_namespace if confined else bool(owner.account) if by_account else True
        if selector and not _holds(selector, owner.labels, everything=everything):
            return False
        if confined and not _holds(spec["namespaceSelector"], owner.namespace_labels, everything=has_namespace):
            return False
        return "serviceAccountSelector" not in spec or _holds(
            spec["serviceAccountSelector"], owner.account_labels, everything=bool(owner.account)
        )

    # --- rules ------------------------------------------------------------------------------------------------------

    def _matches(self, rule: Manifest, namespace: str, direction: str, probe: Probe) -> bool:
        sides = [rule.get("source", {}), rule.get("destination", {})]
        nets = [net for side in sides for name in ("nets", "notNets") for net in side.get(name, [])]
        versions = {ip_network(net).version for net in nets} | {rule.get("ipVersion", probe.version)}
        protocol, refused = _number(rule.get("protocol")), _number(rule.get("notProtocol"))
        if versions != {probe.version} or (protocol, probe.version) in ((1, 6), (58, 4)):
            return False
        if protocol not in (None, probe.protocol) or refused == probe.protocol:
            return False
        if "icmp" in rule and not _is_icmp(rule["icmp"], probe):
            return False
        if "notICMP" in rule and _is_icmp(rule["notICMP"], probe):
            return False
        return self._entity(sides[0], namespace, probe, probe.source, probe.source_port, egress=False) and self._entity(
            sides[1], namespace, probe, probe.destination, probe.destination_port, egress=direction == "egress"
        )

    def _entity(self, entity: Manifest, namespace: str, probe: Probe, address: str, port: int, *, egress: bool) -> bool:
        if "services" in entity:
            return self._is_backend(entity["services"], address, (probe.protocol, port) if egress else None)
        if "nets" in entity and not _within(address, entity["nets"]):
            return False
        if _within(address, entity.get("notNets", [])):
            return False
        owners = [owner for owner in (*self.pods, *self.hosts, *self.sets) if owner.owns(address)]
        named = [name for name in ("selector", "serviceAccounts", "namespaceSelector") if name in entity]
        if namespace and "notSelector" in entity:
            named.append("notSelector")
        refused = [owner for owner in owners if "notSelector" in entity and _holds(entity["notSelector"], owner.labels)]
        if named:  # one owner has to be the one and not the other
            chosen = [owner for owner in owners if self._is_peer(entity, namespace, owner) and owner not in refused]
            if not chosen:
                return False
        else:
            chosen = owners
            if refused:
                return False
        declared = {
            name
            for owner in chosen
            for name, protocol, number in owner.ports
            if (protocol, number) == (probe.protocol, port)
        }
        if "ports" in entity and not _has_port(entity["ports"], probe.protocol, port, declared):
            return False
        return not ("notPorts" in entity and _has_port(entity["notPorts"], probe.protocol, port, declared))

    def _is_peer(self, entity: Manifest, namespace: str, owner: Owner) -> bool:
        """The positive part of an entity, of one owner of the address."""
        has_namespace = bool(owner.namespace)
        if "namespaceSelector" in entity:
            text = entity["namespaceSelector"]
            if text == "global()":
                if has_namespace:
                    return False
            elif not _holds(text, owner.namespace_labels, everything=has_namespace):
                return False
        elif namespace and owner.namespace != namespace:
            return False
        accounts = entity.get("serviceAccounts", {})
        if "names" in accounts and owner.account not in accounts["names"]:
            return False
        if "selector" in accounts and not _holds(
            accounts["selector"], owner.account_labels, everything=bool(owner.account)
        ):
            return False
        return _holds(entity.get("selector", ""), owner.labels)

    def _is_backend(self, service: Manifest, address: str, target: Optional[tuple[int, int]]) -> bool:
        for item in self.slices:
            meta = item["metadata"]
            if (meta["namespace"], meta["labels"]["kubernetes.io/service-name"]) != (
                service["namespace"],
                service["name"],
            ):
                continue
            addresses = [ip_address(one) for endpoint in item["endpoints"] for one in endpoint["addresses"]]
            ports = [(NUMBERS[port["protocol"]], port["port"]) for port in item["ports"]]
            if ip_address(address) in addresses and (target is None or target in ports):
                return True
        return False


class _KubernetesCluster(Cluster):
    """The Kubernetes objects; with Calico a host endpoint's named ports count for rules without peers, too."""

    def __init__(self, manifests: list[Manifest], calico: CalicoCluster) -> None:
        super().__init__(manifests)
        self._calico = calico

    def pod_ports(self, address: str) -> list[tuple[str, str, int]]:
        """Those of the pod alone."""
        return super().declared_ports(address)

    def declared_ports(self, address: str) -> list[tuple[str, str, int]]:
        """Those of the pod or host endpoint."""
        names = {number: name for name, number in NUMBERS.items()}
        hosts = [host for host in self._calico.hosts if host.owns(address)]
        return self.pod_ports(address) + [
            (name, names[number], port) for host in hosts for name, number, port in host.ports
        ]

    def simple(self, probe: Probe) -> tuple[str, str, str, int]:
        """The probe in the words of `Cluster`."""
        names = {number: name for name, number in NUMBERS.items()}
        return probe.source, probe.destination, names.get(probe.protocol, ""), probe.destination_port


def _sort_key(policy: Manifest) -> tuple[float, str]:
    meta = policy["metadata"]
    if policy["apiVersion"].startswith("networking"):
        kind, order = "KubernetesNetworkPolicy", 1000.0
    else:
        kind, order = policy["kind"], policy["spec"].get("order", math.inf)
    return order, f"{meta['name']}/{meta.get('namespace', '')}/{kind}"


def _number(protocol: Any) -> Optional[int]:
    return NUMBERS[protocol] if isinstance(protocol, str) else protocol


def _is_icmp(match: Manifest, probe: Probe) -> bool:
    # Every echo request has code 0.
    return probe.protocol in (1, 58) and match["type"] == probe.icmp_type and match.get("code", 0) == 0


def _within(address: str, nets: list[str]) -> bool:
    return any(ip_address(address) in ip_network(net) for net in nets)


def _has_port(entries: list[Any], protocol: int, port: int, declared: set[str]) -> bool:
    if protocol not in (6, 17, 132):
        return False
    for entry in entries:
        if isinstance(entry, int):
            if entry == port:
                return True
        elif ":" in entry:
            first, last = entry.split(":")
            if int(first) <= port <= int(last):
                return True
        elif entry in declared:
            return True
    return False
