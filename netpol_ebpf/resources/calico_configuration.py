# SPDX-License-Identifier: Apache-2.0
"""FelixConfiguration and KubeControllersConfiguration: only the fields about host endpoints.

Both kinds have many fields for other programs, and get more with each release.  So unknown fields are accepted, unless
the name is similar to that of a known field.  If an object has a field that changes verdicts in Calico but has no
effect here, a warning is recorded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from netpol_ebpf.resources.calico import VERSION, read_net
from netpol_ebpf.resources.calico_rule import read_selector
from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.reader import Reader, describe, suggestion
from netpol_ebpf.resources.syntax import MAX_PORT, PROTOCOLS, check_dns_subdomain, check_label
from netpol_ebpf.resources.types import (
    FailsafePort,
    FelixConfiguration,
    HostEndpointTemplate,
    KubeControllersConfiguration,
    Meta,
)

DEFAULT = "default"
NODE_PREFIX = "node."
"""The name of a FelixConfiguration for one node is this prefix followed by the node's name."""

_FAILSAFES = ("failsafeInboundHostPorts", "failsafeOutboundHostPorts")
FAILSAFE_PROTOCOLS = ("TCP", "UDP")
_NOT_FOLLOWED = {
    "allowIPIPPacketsFromWorkloads": "the agent's option --tunnel",
    "allowVXLANPacketsFromWorkloads": "the agent's option --tunnel",
    "defaultEndpointToHostAction": "the agent's option --workload-to-host",
    "dropActionOverride": "nothing",
    "vxlanPort": "the node's own device and the agent's option --tunnel",
    "wireguardListeningPort": "the agent's option --tunnel",
    "wireguardListeningPortV6": "the agent's option --tunnel",
    "workloadSourceSpoofing": "the agent's option --allow-source-prefixes",
}
"""Fields that change verdicts in Calico and have no effect here, with the setting that replaces each field."""

MODES = ("Enabled", "Disabled")
_FOREIGN = re.compile(r"\(\?(?!:)|\[\[:|\\[^\W_bBdDsSwW]|\\_|[*+?}][*+]|\{,")
"""Regular expression syntax that has different meanings in Python and Go (RE2), or that only one of them accepts."""


# --- FelixConfiguration ---------------------------------------------------------------------------------------------


def _check_felix_name(name: str) -> str | None:
    node = name.removeprefix(NODE_PREFIX) if name.startswith(NODE_PREFIX) else name
    if name != DEFAULT and node == name:
        return f'must be "{DEFAULT}" (for all nodes) or "{NODE_PREFIX}" and the name of a node; is "{name}"'
    return check_dns_subdomain(node)


def _felix_configuration(obj: Reader, meta: Meta) -> FelixConfiguration:
    spec = obj.mapping("spec") or Reader({}, ("spec",), obj.report)
    lists = [tuple(_failsafes(spec, key)) if spec.has(key) else None for key in _FAILSAFES]
    for key, what in _NOT_FOLLOWED.items():
        if spec.has(key):
            spec.warning(key, f"has no effect here; {what} decides", slug="not-followed")
    _refuse_misspelled(spec, *_FAILSAFES)
    return FelixConfiguration(meta, *lists)


def _failsafes(spec: Reader, key: str) -> Iterator[FailsafePort]:
    for entry in spec.mappings(key):
        protocol = _failsafe_protocol(entry)
        port = entry.integer("port", 1, MAX_PORT)
        if not entry.has("port"):
            entry.missing("port")
        text = entry.string("net")
        net = read_net(spec, (*entry.path, "net"), text) if text else None
        entry.done()
        if protocol is not None and port is not None:
            yield FailsafePort(protocol, port, net)


def _failsafe_protocol(entry: Reader) -> int | None:
    """Parse the protocol of a failsafe port to its IANA number. None after an error.

    The protocol is TCP or UDP, in upper or lower case, as in Calico.
    """
    name = entry.required_string("protocol")
    if not name or name.upper() in FAILSAFE_PROTOCOLS:
        return PROTOCOLS.get(name.upper())
    entry.error("protocol", f"must be {' or '.join(FAILSAFE_PROTOCOLS)}, is {describe(name)}", slug="enum")
    return None


# --- KubeControllersConfiguration -----------------------------------------------------------------------------------


def _check_controllers_name(name: str) -> str | None:
    return None if name == DEFAULT else f'must be "{DEFAULT}", is "{name}"'


def _kube_controllers_configuration(obj: Reader, meta: Meta) -> KubeControllersConfiguration:
    hosts = obj
    for key in ("spec", "controllers", "node", "hostEndpoint"):
        found = hosts.mapping(key)
        if hosts is not obj:
            _refuse_misspelled(hosts, key)
        if found is None:
            return KubeControllersConfiguration(meta)
        hosts = found
    creates = hosts.enum("autoCreate", MODES) == "Enabled"
    creates_default = hosts.enum("createDefaultHostEndpoint", MODES) != "Disabled"
    names: set[str] = set()
    templates = []
    for entry in hosts.mappings("templates"):
        template = _template(entry)
        if template.name in names:
            entry.error("generateName", f"another template has the name {describe(template.name)}", slug="conflict")
        names.add(template.name)
        templates.append(template)
    hosts.done()
    return KubeControllersConfiguration(meta, creates, creates_default, tuple(templates))


def _template(entry: Reader) -> HostEndpointTemplate:
    name = entry.required_string("generateName")
    if name and (message := check_dns_subdomain(name)) is not None:
        entry.error("generateName", message, slug="name")
    nets = tuple(
        net for net in (read_net(entry, path, text) for path, text in entry.indexed_strings("interfaceCIDRs")) if net
    )
    pattern = entry.string("interfacePattern") or None
    if pattern is not None:
        _check_pattern(entry, pattern)
    elif not entry.list("interfaceCIDRs"):
        entry.error(None, "needs `interfaceCIDRs`, `interfacePattern` or both", slug="required")
    selector = read_selector(entry, "nodeSelector")
    labels = entry.string_map("labels", check_label)
    entry.done()
    return HostEndpointTemplate(name, nets, pattern, selector, labels)


def _check_pattern(entry: Reader, pattern: str) -> None:
    if "\n" in pattern:
        entry.error("interfacePattern", f"holds a line break, so it matches no interface: {describe(pattern)}")
        return
    if (foreign := _FOREIGN.search(pattern)) is not None:
        message = f"holds {describe(foreign.group())}, which is not read here"
        entry.error("interfacePattern", f"{message}; write it with letters, [classes], (groups), | and *, +, ?")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of syntax that a later version reads differently
            re.compile(pattern)
    except (re.error, Warning) as error:
        entry.error("interfacePattern", f"is no regular expression: {error}")


def _refuse_misspelled(reader: Reader, *known: str) -> None:
    for key in reader.fields():
        if key not in known and key not in _NOT_FOLLOWED and (near := suggestion(key, known)):
            reader.error(key, f"unknown field `{key}`{near}", slug="unknown-field")


KINDS = (
    Kind(VERSION, "FelixConfiguration", namespaced=False, parse=_felix_configuration, check_name=_check_felix_name),
    Kind(
        VERSION,
        "KubeControllersConfiguration",
        namespaced=False,
        parse=_kube_controllers_configuration,
        check_name=_check_controllers_name,
    ),
)
