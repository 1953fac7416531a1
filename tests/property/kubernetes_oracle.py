# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy judged straight from the YAML, by the words of the Kubernetes API documentation.

It shares no code with the product: no typed resources, no selectors, no tiers.  A policy isolates the pods it selects; a
connection of an isolated pod needs a rule of some policy that selects it; everything else is allowed.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any, Optional

Manifest = dict[str, Any]


class Cluster:
    """One cluster state. Host-network and finished pods are nobody: their addresses are like any outside address."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self.namespaces = {
            item["metadata"]["name"]: {
                **item["metadata"].get("labels", {}),
                "kubernetes.io/metadata.name": item["metadata"]["name"],
            }
            for item in manifests
            if item["kind"] == "Namespace"
        }
        self.pods = [
            item
            for item in manifests
            if item["kind"] == "Pod"
            and not item["spec"].get("hostNetwork")
            and item["status"]["phase"] not in ("Succeeded", "Failed")
        ]
        self.policies = [item for item in manifests if item["kind"] == "NetworkPolicy"]

    def pod_at(self, address: str) -> Optional[Manifest]:
        """The pod with that address."""
        wanted = ip_address(address)
        for pod in self.pods:
            if wanted in [ip_address(entry["ip"]) for entry in pod["status"]["podIPs"]]:
                return pod
        return None

    def is_allowed(self, pod: Manifest, direction: str, probe: tuple[str, str, str, int]) -> bool:
        """Whether policies let ``pod`` send (Egress) or receive (Ingress) this first packet."""
        selecting = [policy for policy in self.policies if self.selects(policy, pod, direction)]
        if not selecting:
            return True
        return any(self.matching_rule(policy, direction, probe) is not None for policy in selecting)

    def matching_rule(self, policy: Manifest, direction: str, probe: tuple[str, str, str, int]) -> Optional[int]:
        """Index of the first rule of the policy that matches."""
        source, destination, protocol, port = probe
        for index, rule in enumerate(policy["spec"].get(direction.lower(), [])):
            peer = source if direction == "Ingress" else destination
            if self._has_peer(rule, policy, peer) and self._has_port(rule, destination, protocol, port):
                return index
        return None

    def selects(self, policy: Manifest, pod: Manifest, direction: str) -> bool:
        """Whether the policy isolates the pod in that direction."""
        spec = policy["spec"]
        types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
        return (
            direction in types
            and policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
            and _selected(spec["podSelector"], pod["metadata"].get("labels", {}))
        )

    def _has_peer(self, rule: Manifest, policy: Manifest, address: str) -> bool:
        peers = rule.get("from") or rule.get("to")
        return not peers or any(self._is_peer(peer, policy, address) for peer in peers)

    def _is_peer(self, peer: Manifest, policy: Manifest, address: str) -> bool:
        if "ipBlock" in peer:
            block = peer["ipBlock"]
            return ip_address(address) in ip_network(block["cidr"]) and not any(
                ip_address(address) in ip_network(hole) for hole in block.get("except", [])
            )
        pod = self.pod_at(address)
        if pod is None:
            return False
        namespace = pod["metadata"]["namespace"]
        if "namespaceSelector" in peer:
            in_namespace = _selected(peer["namespaceSelector"], self.namespaces[namespace])
        else:
            in_namespace = namespace == policy["metadata"]["namespace"]
        return in_namespace and _selected(peer.get("podSelector", {}), pod["metadata"].get("labels", {}))

    def _has_port(self, rule: Manifest, destination: str, protocol: str, port: int) -> bool:
        entries = rule.get("ports")
        return not entries or any(self._is_port(entry, destination, protocol, port) for entry in entries)

    def _is_port(self, entry: Manifest, destination: str, protocol: str, port: int) -> bool:
        if entry.get("protocol", "TCP") != protocol:
            return False
        wanted = entry.get("port")
        if wanted is None:
            return True
        if isinstance(wanted, int):
            return bool(wanted <= port <= entry.get("endPort", wanted))
        return (wanted, protocol, port) in self.declared_ports(destination)

    def declared_ports(self, address: str) -> list[tuple[str, str, int]]:
        """Name, protocol and number of what the owner of the address declares; init containers count."""
        pod = self.pod_at(address)
        if pod is None:
            return []
        return [
            (declared["name"], declared["protocol"], declared["containerPort"])
            for containers in (pod["spec"]["containers"], pod["spec"].get("initContainers", []))
            for container in containers
            for declared in container.get("ports", [])
        ]


def _selected(selector: Manifest, labels: Manifest) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for requirement in selector.get("matchExpressions", []):
        key, operator = requirement["key"], requirement["operator"]
        if operator == "In" and (key not in labels or labels[key] not in requirement["values"]):
            return False
        if operator == "NotIn" and key in labels and labels[key] in requirement["values"]:
            return False
        if operator == "Exists" and key not in labels:
            return False
        if operator == "DoesNotExist" and key in labels:
            return False
    return True
