# SPDX-License-Identifier: Apache-2.0
"""Objects for an API server: those of examples and case files, and invalid ones with one fault each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from netpol_ebpf.resources import schema_calico, schema_signetwork
from netpol_ebpf.resources.yamltree import read_documents

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
RESOURCES = {(one.api_version, one.kind): one for one in (*schema_calico.RESOURCES, *schema_signetwork.RESOURCES)}
CALICO = "projectcalico.org/v3"
ALPHA1 = "policy.networking.k8s.io/v1alpha1"
ALPHA2 = "policy.networking.k8s.io/v1alpha2"


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of this repository."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def written() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of our kinds in examples and case files, each with its place."""
    for folder in ("examples", "tests/cases"):
        for path in sorted((ROOT / folder).rglob("*.yaml")):
            for number, document in enumerate(read_documents(path.read_text(), str(path), [])):
                value = document.value
                objects = value.get("manifests", [value]) if isinstance(value, dict) else []
                for place, obj in enumerate(objects):
                    if isinstance(obj, dict) and (obj.get("apiVersion"), obj.get("kind")) in RESOURCES:
                        yield f"{path.relative_to(ROOT)}:{number}.{place}", obj


def validation_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of our kinds in tests/data/validation.yaml, valid and invalid, each with its subject."""
    for case in yaml.safe_load((ROOT / "tests" / "data" / "validation.yaml").read_text()):
        obj = case["object"]
        if isinstance(codes := obj["metadata"].get("name"), list):  # of characters: a name of a given length
            obj["metadata"]["name"] = "".join(map(chr, codes))
        if (obj.get("apiVersion"), obj.get("kind")) in RESOURCES:
            yield case["desc"], obj


@dataclass(frozen=True)
class Wrong:
    """A spec with one fault.

    ``says``: a part of the API server's message; "" if only `netpolctl check` rejects the object.
    """

    about: str
    kind: str
    spec: dict[str, Any]
    says: str = ""
    name: str = "x"

    @property
    def object(self) -> dict[str, Any]:
        """The object with this spec."""
        version = next(version for version, kind in RESOURCES if kind == self.kind)
        metadata = {"name": self.name}
        if RESOURCES[version, self.kind].namespaced:
            metadata["namespace"] = "default"
        return {"apiVersion": version, "kind": self.kind, "metadata": metadata, "spec": self.spec}


def _ingress(rule: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"ingress": [{"action": "Allow", **rule}], **spec}


def _egress(rule: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"egress": [{"action": "Allow", **rule}], **spec}


NP, GNP, SNP, SKNP = "NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedKubernetesNetworkPolicy"
ANP, BANP, CNP = "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy"
HEP, SET, KCC, FELIX = "HostEndpoint", "NetworkSet", "KubeControllersConfiguration", "FelixConfiguration"
ALL: dict[str, Any] = {"namespaces": {}}


def _cluster(*, key: str = "ingress", rule: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    peers = "from" if key == "ingress" else "to"
    one = {"action": "Accept", peers: [ALL]} if rule is None else rule
    return {"tier": "Admin", "priority": 1, "subject": ALL, key: [one], **spec}


def _admin(*, key: str = "ingress", rule: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    peers = "from" if key == "ingress" else "to"
    one = {"action": "Allow", peers: [ALL]} if rule is None else rule
    return {"priority": 1, "subject": ALL, key: [one], **spec}


WRONG = (
    # names
    Wrong("two dots", NP, {}, "the name must be", name="a.b.c"),
    Wrong("reserved prefix", GNP, {}, "the name must be", name="knp.default.a.b"),
    Wrong("a dot in a tier's name", "Tier", {"order": 1}, "the name must have", name="a.b"),
    Wrong("another baseline policy", BANP, {"subject": ALL}, 'must be "default"'),
    Wrong("another configuration", KCC, {}, 'must be "default"'),
    Wrong("a configuration of nothing", FELIX, {}, "the name must be"),
    # tiers
    Wrong("order of a built-in tier", "Tier", {"order": 5}, "is built in", name="default"),
    Wrong("action of a built-in tier", "Tier", {"order": 1000}, "is built in", name="kube-admin"),
    Wrong("no order of a built-in tier", "Tier", {}, "is built in", name="default"),
    Wrong("unknown action", "Tier", {"order": 1, "defaultAction": "Drop"}, "Unsupported value"),
    # specs of Calico policies
    Wrong("a tier with a dot", NP, {"tier": "a.b"}, "spec.tier"),
    Wrong("an empty selector of another type", NP, {"selector": True}, "must be of type string"),
    Wrong("a long selector", NP, {"selector": "a == '" + "x" * 1024 + "'"}, "Too long"),
    Wrong("a selector of two lines", NP, {"selector": "a == 'b' &&\nc == 'd'"}, "spec.selector"),
    Wrong("a type twice", NP, {"types": ["Ingress", "Ingress"]}, "Duplicate value"),
    Wrong("an unknown type", NP, {"types": ["ingress"]}, "Unsupported value"),
    Wrong("an unknown hint", NP, {"performanceHints": ["x"]}, "Unsupported value"),
    Wrong(
        "preDNAT and doNotTrack",
        GNP,
        {"preDNAT": True, "doNotTrack": True, "applyOnForward": True},
        "cannot be combined",
    ),
    Wrong("preDNAT without applyOnForward", GNP, {"preDNAT": True, "types": ["Ingress"]}, "applyOnForward: true"),
    Wrong(
        "preDNAT with egress",
        GNP,
        _egress({}, preDNAT=True, applyOnForward=True, types=["Ingress"]),
        "only ingress rules",
    ),
    Wrong("preDNAT of type Egress", GNP, {"preDNAT": True, "applyOnForward": True, "types": ["Egress"]}, "type Egress"),
    Wrong("a staged deletion with rules", SNP, _ingress({}, stagedAction="Delete"), "must be empty"),
    Wrong("a staged deletion with an order", SNP, {"order": 0, "stagedAction": "Delete"}, "must be empty"),
    Wrong("an unknown staged action", SNP, {"stagedAction": "Remove"}, "Unsupported value"),
    Wrong("too many rules", NP, {"ingress": [{"action": "Allow"}] * 1025}, "Too many"),
    # rules
    Wrong("no action", NP, {"ingress": [{}]}, "Required value"),
    Wrong("an action in lower case", NP, {"ingress": [{"action": "allow"}]}, "Unsupported value"),
    Wrong("ipVersion 5", NP, _ingress({"ipVersion": 5}), "Unsupported value"),
    Wrong("protocol in lower case", NP, _ingress({"protocol": "tcp"}), "protocol"),
    Wrong("protocol 0", NP, _ingress({"protocol": 0}), "protocol"),
    Wrong("protocol 256", NP, _ingress({"notProtocol": 256}), "rotocol"),
    Wrong("protocol 256 as text", NP, _ingress({"protocol": "256"}), "protocol"),
    Wrong("icmp without protocol", NP, _ingress({"icmp": {"type": 8}}), "icmp needs protocol"),
    Wrong("icmp with TCP", NP, _ingress({"icmp": {"type": 8}, "protocol": "TCP"}), "icmp needs protocol"),
    Wrong("icmp type 255", NP, _ingress({"icmp": {"type": 255}, "protocol": "ICMP"}), "less than or equal to 254"),
    Wrong("icmp code alone", NP, _ingress({"notICMP": {"code": 1}}), "needs a type"),
    Wrong("ICMP of IPv6", NP, _ingress({"ipVersion": 6, "protocol": "ICMP"}), "exists only in IPv4"),
    Wrong("not ICMPv6 of IPv4", NP, _ingress({"ipVersion": 4, "notProtocol": 58}), "exists only in IPv6"),
    Wrong("port number without protocol", NP, _ingress({"destination": {"ports": [80]}}), "need protocol"),
    Wrong("a port of ICMP", NP, _ingress({"protocol": 1, "destination": {"notPorts": ["http"]}}), "need protocol"),
    Wrong("port 0", NP, _ingress({"protocol": "TCP", "destination": {"ports": [0]}}), "ports[0]"),
    Wrong("port 65536 as text", NP, _ingress({"protocol": "TCP", "destination": {"ports": ["65536"]}}), "ports[0]"),
    Wrong("a range with a space", NP, _ingress({"protocol": "TCP", "destination": {"ports": ["1 : 2"]}}), "ports[0]"),
    Wrong("a range to 70000", NP, _ingress({"protocol": "TCP", "destination": {"ports": ["1:70000"]}}), "ports[0]"),
    Wrong("51 ports", NP, _ingress({"protocol": "TCP", "source": {"ports": list(range(1, 52))}}), "Too many"),
    Wrong("a net without prefix", NP, _ingress({"source": {"nets": ["10.0.0.1"]}}), "nets[0]"),
    Wrong("257 nets", NP, _ingress({"source": {"nets": ["10.0.0.0/8"] * 257}}), "Too many"),
    Wrong("not any address", NP, _ingress({"source": {"notNets": ["0.0.0.0/0"]}}), "notNets[0]"),
    Wrong(
        "services of an ingress destination",
        NP,
        _ingress({"destination": {"services": {"name": "a"}}}),
        "services is allowed",
    ),
    Wrong("services of an egress source", NP, _egress({"source": {"services": {"name": "a"}}}), "services is allowed"),
    Wrong(
        "services and selector",
        NP,
        _ingress({"source": {"services": {"name": "a"}, "selector": "b == 'c'"}}),
        "cannot be combined",
    ),
    Wrong(
        "services and ports",
        NP,
        _egress({"protocol": "TCP", "destination": {"services": {"name": "a"}, "ports": [1]}}),
        "own ports",
    ),
    Wrong(
        "services without namespace", GNP, _egress({"destination": {"services": {"name": "a"}}}), "namespace: Required"
    ),
    Wrong("services without name", NP, _egress({"destination": {"services": {"namespace": "a"}}}), "name: Required"),
    Wrong("domains of a source", NP, _egress({"source": {"domains": ["a.b"]}}), "domains"),
    Wrong("domains of an ingress rule", NP, _ingress({"destination": {"domains": ["a.b"]}}), "domains"),
    Wrong(
        "domains denied",
        NP,
        {"egress": [{"action": "Deny", "destination": {"domains": ["a.b"]}}]},
        "only with action Allow",
    ),
    Wrong(
        "domains and nets",
        NP,
        _egress({"destination": {"domains": ["a.b"], "nets": ["10.0.0.0/8"]}}),
        "cannot be combined",
    ),
    Wrong("two stars", NP, _egress({"destination": {"domains": ["*.*.a"]}}), "domains[0]"),
    Wrong("http of an egress rule", NP, _egress({"http": {"methods": ["GET"]}}), "only in ingress rules"),
    Wrong("http denied", NP, {"ingress": [{"action": "Deny", "http": {"methods": ["GET"]}}]}, "only with action Allow"),
    Wrong("http of UDP", NP, _ingress({"protocol": "UDP", "http": {"methods": ["GET"]}}), "needs protocol TCP"),
    Wrong("a method twice", NP, _ingress({"http": {"methods": ["GET", "GET"]}}), "Duplicate value"),
    Wrong("a path of both forms", NP, _ingress({"http": {"paths": [{"exact": "/", "prefix": "/"}]}}), "exactly one"),
    Wrong("a path of no form", NP, _ingress({"http": {"paths": [{}]}}), "exactly one"),
    Wrong("a path with a query", NP, _ingress({"http": {"paths": [{"exact": "/a?b"}]}}), "exact"),
    Wrong(
        "a header without values",
        NP,
        _ingress({"http": {"headers": [{"header": "a", "operator": "In"}]}}),
        "values must be",
    ),
    Wrong(
        "a header that exists with values",
        NP,
        _ingress({"http": {"headers": [{"header": "a", "operator": "Exists", "values": ["b"]}]}}),
        "values must be",
    ),
    # staged Kubernetes policies
    Wrong("an empty peer", SKNP, {"ingress": [{"from": [{}]}]}, "a peer needs"),
    Wrong(
        "addresses and pods",
        SKNP,
        {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]},
        "cannot be combined",
    ),
    Wrong("a block without CIDR", SKNP, {"ingress": [{"from": [{"ipBlock": {}}]}]}, "Required value"),
    Wrong("ICMP ports", SKNP, {"ingress": [{"ports": [{"protocol": "ICMP"}]}]}, "Unsupported value"),
    Wrong("a long port name", SKNP, {"ingress": [{"ports": [{"port": "a" * 16}]}]}, "port"),
    Wrong("a port name of digits", SKNP, {"ingress": [{"ports": [{"port": "80"}]}]}, "port"),
    Wrong("endPort before port", SKNP, {"ingress": [{"ports": [{"port": 5, "endPort": 4}]}]}, "endPort needs"),
    Wrong("endPort of a name", SKNP, {"ingress": [{"ports": [{"port": "a", "endPort": 4}]}]}, "endPort needs"),
    Wrong("three types", SKNP, {"policyTypes": ["Ingress"] * 3}, "Too many"),
    Wrong(
        "In without values",
        SKNP,
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
        "matchExpressions[0]",
    ),
    Wrong(
        "Exists with values",
        SKNP,
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
        "matchExpressions[0]",
    ),
    Wrong("a label value with a space", SKNP, {"podSelector": {"matchLabels": {"a": "b c"}}}, "matchLabels"),
    # sets, endpoints, configuration
    Wrong("a net that is none", SET, {"nets": ["x"]}, "nets[0]"),
    Wrong("a domain that is none", SET, {"allowedEgressDomains": ["a b"]}, "allowedEgressDomains[0]"),
    Wrong("no node", HEP, {"interfaceName": "*"}, "Required value"),
    Wrong("neither interface nor addresses", HEP, {"node": "n"}, "must be given"),
    Wrong("an empty interface alone", HEP, {"node": "n", "interfaceName": ""}, "must be given"),
    Wrong("a long interface", HEP, {"node": "n", "interfaceName": "a" * 16}, "interfaceName"),
    Wrong("a CIDR for an address", HEP, {"node": "n", "expectedIPs": ["10.0.0.0/8"]}, "expectedIPs[0]"),
    Wrong(
        "a port of ICMP",
        HEP,
        {"node": "n", "interfaceName": "*", "ports": [{"name": "a", "protocol": "ICMP", "port": 1}]},
        "must be TCP",
    ),
    Wrong(
        "a failsafe of SCTP",
        FELIX,
        {"failsafeInboundHostPorts": [{"protocol": "SCTP", "port": 1}]},
        "protocol",
        name="default",
    ),
    Wrong(
        "a template of nothing",
        KCC,
        {"controllers": {"node": {"hostEndpoint": {"templates": [{"generateName": "a"}]}}}},
        "must be given",
        name="default",
    ),
    # the network group
    Wrong("no tier", CNP, {"priority": 1, "subject": ALL}, "tier: Required"),
    Wrong("priority 1001", CNP, _cluster(priority=1001), "1000"),
    Wrong("no subject", CNP, {"tier": "Admin", "priority": 1}, "subject: Required"),
    Wrong("two subjects", CNP, _cluster(subject={"namespaces": {}, "pods": {"podSelector": {}}}), "exactly one"),
    Wrong("an empty subject", CNP, _cluster(subject={}), "exactly one"),
    Wrong("Allow for Accept", CNP, _cluster(rule={"action": "Allow", "from": [ALL]}), "Unsupported value"),
    Wrong("Accept for Allow", ANP, _admin(rule={"action": "Accept", "from": [ALL]}), "Unsupported value"),
    Wrong("no peers", CNP, _cluster(rule={"action": "Deny"}), "from: Required"),
    Wrong("an empty list of peers", CNP, _cluster(rule={"action": "Deny", "from": []}), "at least 1"),
    Wrong(
        "two kinds of peer",
        CNP,
        _cluster(rule={"action": "Deny", "from": [{"namespaces": {}, "pods": {"podSelector": {}}}]}),
        "at most 1",
    ),
    Wrong("26 rules", CNP, _cluster(ingress=[{"action": "Deny", "from": [ALL]}] * 26), "Too many"),
    Wrong("a long name", CNP, _cluster(rule={"name": "a" * 101, "action": "Deny", "from": [ALL]}), "Too long"),
    Wrong(
        "domains denied",
        CNP,
        _cluster(key="egress", rule={"action": "Deny", "to": [{"domainNames": ["a.b"]}]}),
        "only with action Accept",
    ),
    Wrong(
        "a domain of one part",
        CNP,
        _cluster(key="egress", rule={"action": "Accept", "to": [{"domainNames": ["a"]}]}),
        "domainNames[0]",
    ),
    Wrong(
        "IPv4 inside IPv6",
        CNP,
        _cluster(key="egress", rule={"action": "Deny", "to": [{"networks": ["::ffff:10.0.0.0/104"]}]}),
        "networks[0]",
    ),
    Wrong(
        "a named port of networks",
        CNP,
        _cluster(
            key="egress",
            rule={"action": "Deny", "to": [{"networks": ["10.0.0.0/8"]}], "protocols": [{"destinationNamedPort": "a"}]},
        ),
        "no named ports",
    ),
    Wrong(
        "an inverted range",
        CNP,
        _cluster(
            rule={
                "action": "Deny",
                "from": [ALL],
                "protocols": [{"tcp": {"destinationPort": {"range": {"start": 5, "end": 5}}}}],
            }
        ),
        "greater than start",
    ),
    Wrong(
        "port 0",
        CNP,
        _cluster(rule={"action": "Deny", "from": [ALL], "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
        "greater than or equal to 1",
    ),
    Wrong(
        "two kinds of port",
        CNP,
        _cluster(
            rule={
                "action": "Deny",
                "from": [ALL],
                "protocols": [{"tcp": {"destinationPort": {"number": 1}}, "destinationNamedPort": "a"}],
            }
        ),
        "at most 1",
    ),
    Wrong(
        "two kinds of port",
        ANP,
        _admin(rule={"action": "Deny", "from": [ALL], "ports": [{"portNumber": {"port": 1}, "namedPort": "a"}]}),
        "at most 1",
    ),
    Wrong(
        "Pass of a baseline",
        BANP,
        {"subject": ALL, "ingress": [{"action": "Pass", "from": [ALL]}]},
        "Unsupported value",
        name="default",
    ),
    Wrong(
        "an inverted range",
        ANP,
        _admin(rule={"action": "Deny", "from": [ALL], "ports": [{"portRange": {"start": 5, "end": 4}}]}),
        "greater than start",
    ),
    # what only `netpolctl check` and the agent can know
    Wrong("a selector that does not parse", NP, {"selector": "a =="}),
    Wrong("global() of a policy", GNP, {"selector": "global()"}),
    Wrong("a range that ends before it begins", NP, _ingress({"protocol": "TCP", "source": {"ports": ["5:4"]}})),
    Wrong("a port number as text without protocol", NP, _ingress({"source": {"ports": ["80"]}})),
    Wrong("bits beyond the prefix", NP, _ingress({"source": {"nets": ["10.0.0.1/8"]}})),
    Wrong("two IP versions in one rule", NP, _ingress({"source": {"nets": ["10.0.0.0/8", "fd00::/8"]}})),
    Wrong("nets of the other IP version", NP, _ingress({"ipVersion": 6, "source": {"nets": ["10.0.0.0/8"]}})),
    Wrong(
        "a part that is not inside",
        SKNP,
        {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]},
    ),
    Wrong("a label name that is none", SKNP, {"podSelector": {"matchLabels": {"a b": "c"}}}),
    Wrong(
        "a pattern that is none",
        KCC,
        {"controllers": {"node": {"hostEndpoint": {"templates": [{"generateName": "a", "interfacePattern": "("}]}}}},
        name="default",
    ),
)
