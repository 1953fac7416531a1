# SPDX-License-Identifier: Apache-2.0
"""Networks of pods on a laboratory's node, by the real plugins or as well-known layouts made by hand.

All networks are on one node at the same time, with two pods each, ``NETWORK-a`` and ``NETWORK-b``, and the outside
world. Under `POLICY` each pod may open and accept TCP connections to one port and no other, so every network gets the
same questions.

Invariants: plugins run inside the node's namespace, keep their state below the given directory, and are undone by their
own DEL. A plugin's result is written to a results directory only in libcni's format.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

from agent_scene import NODE, NODES, Scene, lab_for, scene_in, wait_for
from border_scene import NODE_ADDRESS, WORLD, has_device, ip

from netpol_ebpf.agent.derived_names import derived_hash
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import SETTINGS_ALL, SETTINGS_ROUTER, Lab
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.scene import INTERNET
from netpol_ebpf.lab.topology import PARENT_MAC, TCP, IPAddress, Listen
from netpol_ebpf.policy.types import EndpointKey

PLUGINS_DIR = Path("/usr/lib/cni")
"""The directory of Debian's package containernetworking-plugins."""
PLUGIN_DEADLINE_S = 60.0
CNI_VERSION = "1.0.0"
ALLOWED, DENIED = 5432, 5433
HOST_PORTS = {18032: ALLOWED, 18033: DENIED}
FAR_NODE = "node-2"
LANS = ("eth1", "eth2")
"""Further interfaces of the node, on links with the world. They are veths like those of pods, as on a node that is a
container. An option declares the first one the node's own; nothing declares the second one."""
VXLAN_PORT = 8472

POLICY = f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: narrow, namespace: shop}}
spec:
  podSelector: {{}}
  policyTypes: [Ingress, Egress]
  ingress: [{{ports: [{{port: {ALLOWED}}}]}}]
  egress: [{{ports: [{{port: {ALLOWED}}}]}}]
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """An existing pod. ``host``: its name in the laboratory."""

    name: str
    addresses: tuple[IPAddress, ...]
    node: str = NODE

    @property
    def host(self) -> str:
        return f"shop/{self.name}"

    @property
    def endpoint(self) -> str:
        return f"Pod/shop/{self.name}"

    def render(self) -> str:
        """The pod's manifest."""
        addresses = ", ".join(f'{{ip: "{one}"}}' for one in self.addresses)
        return (
            "---\napiVersion: v1\nkind: Pod\n"
            f"metadata: {{name: {self.name}, namespace: shop}}\n"
            f"spec: {{nodeName: {self.node}, containers: [{{name: c, image: x}}]}}\n"
            f"status: {{podIPs: [{addresses}]}}\n"
        )


@dataclass(slots=True)
class Questions:
    """Connections between a network's pods, and with the world, by the verdict of policy."""

    ingress_denied: list[Attempt] = field(default_factory=list)
    egress_denied: list[Attempt] = field(default_factory=list)
    allowed: list[Attempt] = field(default_factory=list)

    def __iter__(self) -> Iterator[Attempt]:
        return iter([*self.ingress_denied, *self.egress_denied, *self.allowed])


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to a network's questions. ``open``: whether all were answered without policy; None: not tried."""

    open: tuple[bool, ...]
    ingress_denied: tuple[bool, ...]
    egress_denied: tuple[bool, ...]
    allowed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """One row of the matrix.

    ``evidence``: the evidence by which the agent knows the pods without the plugin's result; "" if it cannot know them.
    ``with_result``: the evidence with that result; None if no runtime keeps one. ``kind``: the kind of device that the
    network needs, with ``options``. ``build``: creates the pods.
    """

    name: str
    ipam: str
    evidence: str
    build: Callable[[Site, Network], None]
    with_result: str | None = "cni"
    kind: str = "veth"
    options: str = ""
    plugin: str = ""

    @property
    def is_seen(self) -> bool:
        """Whether the pods' packets pass an interface of the node that belongs to one pod only."""
        return bool(self.evidence)

    @property
    def pods(self) -> tuple[str, str]:
        """The names of the network's two pods."""
        return f"{self.name}-a", f"{self.name}-b"


@dataclass
class Site:
    """The node on which networks are built.

    ``results``: the directory of libcni's cache; None: no runtime keeps one.
    """

    lab: Lab
    home: Path
    results: Path | None
    pods: dict[str, Pod] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict)
    await_programs: Callable[[str], None] = lambda _name: None
    """Waits until the agent has seen an interface of the node, if an agent runs."""
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # --- addresses --------------------------------------------------------------------------------------------------

    def number(self, network: Network) -> int:
        """The third part of the network's IPv4 prefix, and the last part of its IPv6 prefix."""
        return NETWORKS.index(network) + 1

    def prefix(self, network: Network, version: int) -> str:
        number = self.number(network)
        return f"10.40.{number}.0/24" if version == 4 else f"fd00:40:0:{number}::/64"

    def address(self, network: Network, last: int, version: int) -> str:
        number = self.number(network)
        return f"10.40.{number}.{last}" if version == 4 else f"fd00:40:0:{number}::{last:x}"

    # --- namespaces -------------------------------------------------------------------------------------------------

    def namespace(self, pod: str) -> str:
        """Create a namespace for a pod, as a runtime does before it calls a plugin. Returns its name."""
        host = f"shop/{pod}"
        name = f"{self.lab.token}-{host.replace('/', '.')}"
        self.lab.record(namespaces=[name])
        ip(self.lab, NODE, f"netns add {name}")
        self.lab.namespace_of[host] = name
        self.lab.prober.write_settings(host, SETTINGS_ALL)
        ip(self.lab, host, "link set lo up")
        return name

    def settle(self, network: Network, addresses: Mapping[str, Iterable[IPAddress]], *, node: str = NODE) -> None:
        """Register the pods of a network: they listen, and get the common questions."""
        for name, found in addresses.items():
            pod = Pod(name, tuple(found), node)
            self.pods[name] = pod
            self.lab.prober.listen(pod.host, pod.addresses, [Listen(TCP, port) for port in (ALLOWED, DENIED)])
        if node == NODE:
            self.questions[network.name] = self._common(*(self.pods[name] for name in network.pods))

    def _common(self, client: Pod, server: Pod) -> Questions:
        asked = Questions()
        for own in server.addresses:
            world = ip_address(WORLD[own.version])
            asked.ingress_denied += [Attempt(INTERNET, own, TCP, DENIED), Attempt(client.host, own, TCP, DENIED)]
            asked.egress_denied += [Attempt(client.host, world, TCP, DENIED)]
            asked.allowed += [
                Attempt(INTERNET, own, TCP, ALLOWED),
                Attempt(client.host, own, TCP, ALLOWED),
                Attempt(client.host, world, TCP, ALLOWED),
            ]
        return asked

    # --- plugins ----------------------------------------------------------------------------------------------------

    def ipam(self, network: Network, pod: str, *, gateway: int = 1) -> dict[str, Any]:
        """The part of a plugin's configuration that assigns addresses.

        ``gateway``: the last part of the gateway's address.
        """
        routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        if network.ipam == "host-local":
            ranges = [
                [{"subnet": self.prefix(network, version), "rangeStart": self.address(network, 16, version),
                  "gateway": self.address(network, gateway, version)}]
                for version in (4, 6)
            ]  # fmt: skip
            return {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": str(self.home / "ipam")}
        last = 0x20 + network.pods.index(pod)
        bits = {4: 24, 6: 64}
        return {
            "type": "static", "routes": routes,
            "addresses": [{"address": f"{self.address(network, last, version)}/{bits[version]}",
                           "gateway": self.address(network, gateway, version)} for version in (4, 6)],
        }  # fmt: skip

    def plug(self, network: Network, pod: str, *plugins: dict[str, Any]) -> tuple[IPAddress, ...]:
        """Attach a pod by a chain of plugins, each with the result of the one before. Returns the pod's addresses."""
        namespace = NETNS_DIR / self.namespace(pod)
        container = secrets.token_hex(32)
        arguments = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": pod, "K8S_POD_INFRA_CONTAINER_ID": container}
        environment = {
            "CNI_CONTAINERID": container, "CNI_NETNS": str(namespace), "CNI_IFNAME": "eth0", "CNI_PATH": str(PLUGINS_DIR),
            "CNI_ARGS": ";".join(["IgnoreUnknown=1", *(f"{key}={value}" for key, value in arguments.items())]),
        }  # fmt: skip
        configs = [{"cniVersion": CNI_VERSION, "name": network.name, **one} for one in plugins]
        result: dict[str, Any] = {}
        for config in configs:
            if result:
                config["prevResult"] = result
            self._undo.callback(self._call, "DEL", config, environment)
            result = json.loads(self._call("ADD", config, environment))
        self._keep(network, container, configs, arguments, result)
        return tuple(ip_interface(one["address"]).ip for one in result["ips"])

    def _call(self, command: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> str:
        """Run a plugin in the node's namespace. Returns its output."""
        program = PLUGINS_DIR / str(config["type"])
        assert program.exists(), f"{program} is missing: apt install containernetworking-plugins"
        done = subprocess.run(
            self.lab.command(NODE, [str(program)]),
            input=json.dumps(config), env={**os.environ, **environment, "CNI_COMMAND": command},
            check=False, capture_output=True, text=True, timeout=scaled(PLUGIN_DEADLINE_S),
        )  # fmt: skip
        assert done.returncode == 0, f"{program.name} {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _keep(
        self, network: Network, container: str, configs: list[dict[str, Any]], arguments: Mapping[str, str], result: Any
    ) -> None:
        """Write the result as a runtime's libcni does, atomically (the cache `cniCacheV1`)."""
        if self.results is None:
            return
        chain = {"cniVersion": CNI_VERSION, "name": network.name, "plugins": configs}
        document = {
            "kind": "cniCacheV1", "containerId": container, "config": base64.b64encode(json.dumps(chain).encode()).decode(),
            "ifName": "eth0", "networkName": network.name, "cniArgs": [list(pair) for pair in arguments.items()], "result": result,
        }  # fmt: skip
        path = self.results / f"{network.name}-{container}-eth0"
        draft = self.results / f".{path.name}"
        draft.write_text(json.dumps(document))
        draft.chmod(0o600)
        draft.rename(path)
        self._undo.callback(path.unlink)

    def close(self) -> None:
        """Undo the work of the plugins, by the DEL of each."""
        self._undo.close()


# --- by plugins ---------------------------------------------------------------------------------------------------------


def bridge_plugin(site: Site, network: Network, **more: Any) -> dict[str, Any]:
    """The configuration of the bridge plugin. The caller adds the pod's ``ipam``."""
    return {"type": "bridge", "bridge": f"cni{site.number(network)}", "isGateway": True, "hairpinMode": True, **more}


def build_bridge(site: Site, network: Network, **more: Any) -> None:
    config = bridge_plugin(site, network, **more)
    found = {pod: site.plug(network, pod, {**config, "ipam": site.ipam(network, pod)}) for pod in network.pods}
    site.settle(network, found)


def build_bridge_vlan(site: Site, network: Network) -> None:
    """Ports of one VLAN on a VLAN-filtering bridge. The gateway is a separate interface in that VLAN."""
    build_bridge(site, network, vlan=5)


def build_bridge_inner(site: Site, network: Network) -> None:
    """The gateway is one end of a veth pair of the node, and the other end is a port of the bridge.

    The plugin makes this layout for a VLAN; here it has none.
    """
    config = {"type": "bridge", "bridge": f"cni{site.number(network)}", "hairpinMode": True}
    found = {pod: site.plug(network, pod, {**config, "ipam": site.ipam(network, pod)}) for pod in network.pods}
    ip(
        site.lab, NODE, "link add inner0 type veth peer name inner1", "link set inner0 up",
        f"link set inner1 master {config['bridge']} up", f"address add {site.address(network, 1, 4)}/24 dev inner0",
        f"address add {site.address(network, 1, 6)}/64 dev inner0 nodad",
    )  # fmt: skip
    wait_for(lambda: "inner1" in forwarding_ports(site.lab), "the port of the gateway forwards")
    site.settle(network, found)


def build_bridge_macvlan(site: Site, network: Network) -> None:
    """The gateway is a macvlan device on the bridge."""
    config = {"type": "bridge", "bridge": f"cni{site.number(network)}", "hairpinMode": True}
    found = {pod: site.plug(network, pod, {**config, "ipam": site.ipam(network, pod)}) for pod in network.pods}
    ip(
        site.lab, NODE, f"link add upper0 link {config['bridge']} type macvlan mode bridge", "link set upper0 up",
        f"address add {site.address(network, 1, 4)}/24 dev upper0",
        f"address add {site.address(network, 1, 6)}/64 dev upper0 nodad",
    )  # fmt: skip
    site.settle(network, found)


def forwarding_ports(lab: Lab) -> set[str]:
    """The ports of the node's bridges that forward."""
    ports = json.loads(lab.run(NODE, ["bridge", "-j", "link", "show"]).stdout)
    return {one["ifname"] for one in ports if one["state"] == "forwarding"}


def build_portmap(site: Site, network: Network) -> None:
    """A bridge, and ports of the node that are translated to the server."""
    config = bridge_plugin(site, network)
    found = {}
    for pod in network.pods:
        ports = [{"hostPort": port, "containerPort": to, "protocol": "tcp"} for port, to in HOST_PORTS.items()]
        mapped = {"portMappings": ports if pod == network.pods[1] else []}
        chained = {"type": "portmap", "capabilities": {"portMappings": True}, "runtimeConfig": mapped}
        found[pod] = site.plug(network, pod, {**config, "ipam": site.ipam(network, pod)}, chained)
    site.settle(network, found)
    asked = site.questions[network.name]
    by_verdict = {ALLOWED: asked.allowed, DENIED: asked.ingress_denied}
    for port, to in HOST_PORTS.items():
        by_verdict[to].append(Attempt(INTERNET, ip_address(NODE_ADDRESS[4]), TCP, port))


def build_ptp(site: Site, network: Network) -> None:
    found = {pod: site.plug(network, pod, {"type": "ptp", "ipam": site.ipam(network, pod)}) for pod in network.pods}
    site.settle(network, found)


def outside_on_link(site: Site, network: Network, device: str) -> None:
    """Put the world on the network's link, as its gateway."""
    ip(site.lab, INTERNET, *(f"address add {site.address(network, 254, v)}/{bits} dev {device}{dad}"
                             for v, bits, dad in ((4, 24, ""), (6, 64, " nodad"))))  # fmt: skip


def bridge_outside(site: Site, network: Network, *ports: str) -> None:
    """Join interfaces of the world in a bridge, which is the gateway."""
    name = f"br{site.number(network)}"
    ip(site.lab, INTERNET, f"link add {name} type bridge", f"link set {name} up",
       *(f"link set {port} master {name} up" for port in ports))  # fmt: skip
    outside_on_link(site, network, name)


MASTERS = {"macvlan": "eth0", "ipvlan": LANS[0], "macvlan-lan": LANS[1]}
"""By network: the interface of the node on which its pods' devices are made."""


def build_on_master(site: Site, network: Network) -> None:
    """Macvlan or ipvlan devices on one of the node's own interfaces."""
    master = MASTERS[network.name]
    outside_on_link(site, network, {"eth0": "node0"}.get(master, master))
    mode = {"macvlan": "bridge", "ipvlan": "l2"}[network.plugin]
    config = {"type": network.plugin, "master": master, "mode": mode}
    found = {
        pod: site.plug(network, pod, {**config, "ipam": site.ipam(network, pod, gateway=254)}) for pod in network.pods
    }
    site.settle(network, found)


def build_macvlan_shim(site: Site, network: Network) -> None:
    """Macvlan, and a path from the node to one of its pods: another macvlan device with a host route."""
    build_on_master(site, network)
    master, pod = MASTERS[network.name], site.pods[network.pods[0]]
    ip(site.lab, NODE, f"link add shim0 link {master} type macvlan mode bridge", "link set shim0 up",
       *(f"-{one.version} route add {one}/{one.max_prefixlen} dev shim0" for one in pod.addresses))  # fmt: skip


def build_vlan(site: Site, network: Network) -> None:
    """A VLAN for each pod, on different uplinks, because on one uplink both would have its hardware address.

    The world joins them.
    """
    ports = []
    found = {}
    for number, (pod, master, outside) in enumerate(
        zip(network.pods, ("eth0", LANS[0]), ("node0", LANS[0]), strict=True), 5
    ):
        ip(site.lab, INTERNET, f"link add link {outside} name vlan{number} type vlan id {number}")
        ports.append(f"vlan{number}")
        config = {"type": "vlan", "master": master, "vlanId": number, "ipam": site.ipam(network, pod, gateway=254)}
        found[pod] = site.plug(network, pod, config)
    bridge_outside(site, network, *ports)
    site.settle(network, found)


def build_host_device(site: Site, network: Network) -> None:
    """A device of the node for each pod, as with SR-IOV. The world joins their other ends."""
    ports = []
    found = {}
    for number, pod in enumerate(network.pods):
        device = f"dev{number}"
        ip(site.lab, NODE, f"link add {device} type veth peer name {device} netns {site.lab.namespace_of[INTERNET]}")
        ports.append(device)
        site.await_programs(device)
        config = {"type": "host-device", "device": device, "ipam": site.ipam(network, pod, gateway=254)}
        found[pod] = site.plug(network, pod, config)
    bridge_outside(site, network, *ports)
    site.settle(network, found)


def build_flannel(site: Site, network: Network) -> None:
    """The layout of flannel: the bridge plugin as its delegate, and VXLAN to a pod on the other node."""
    build_bridge(site, network, mtu=1450)
    lab, far = site.lab, f"{network.name}-far"
    other = f"10.41.{site.number(network)}"
    ends = {NODE: (NODE_ADDRESS[4], site.address(network, 0, 4), "02:00:00:00:40:01"),
            FAR_NODE: ("172.30.0.20", f"{other}.0", "02:00:00:00:40:02")}  # fmt: skip
    for node, peer in ((NODE, FAR_NODE), (FAR_NODE, NODE)):
        local, own, mac = ends[node]
        remote, gateway, remote_mac = ends[peer]
        ip(
            lab, node,
            f"link add flannel.1 address {mac} type vxlan id 1 local {local} dev eth0 dstport {VXLAN_PORT} nolearning",
            f"address add {own}/32 dev flannel.1", "link set flannel.1 up",
            f"neigh add {gateway} lladdr {remote_mac} dev flannel.1 nud permanent",
            f"route add {gateway}/24 via {gateway} dev flannel.1 onlink",
        )  # fmt: skip
        lab.run(node, ["bridge", "fdb", "append", remote_mac, "dev", "flannel.1", "dst", remote])
    namespace = site.namespace(far)
    route_pair(site, FAR_NODE, "farveth", namespace, [f"{other}.2"], {4: f"{other}.1"})
    site.settle(network, {far: [ip_address(f"{other}.2")]}, node=FAR_NODE)
    near_a, near_b = (site.pods[pod] for pod in network.pods)
    asked, pod = site.questions[network.name], site.pods[far]
    asked.ingress_denied.append(Attempt(pod.host, near_b.addresses[0], TCP, DENIED))
    asked.egress_denied.append(Attempt(near_a.host, pod.addresses[0], TCP, DENIED))
    asked.allowed += [
        Attempt(pod.host, near_b.addresses[0], TCP, ALLOWED), Attempt(near_a.host, pod.addresses[0], TCP, ALLOWED),
    ]  # fmt: skip


# --- by hand --------------------------------------------------------------------------------------------------------------


def route_pair(
    site: Site,
    node: str,
    name: str,
    namespace: str,
    addresses: Iterable[str],
    gateways: Mapping[int, str],
    *,
    kind: str = "veth",
) -> None:
    """A veth pair with single addresses on both ends, and a host route for each of the pod's addresses.

    ``gateways``: by IP version.
    """
    if kind == "netkit":  # older distributions have no tool with its attributes; the peer is made with it
        before = names_of(site.lab, node)
        ip(site.lab, node, f"link add {name} type netkit")
        (peer,) = names_of(site.lab, node) - before - {name}
        ip(site.lab, node, f"link set {peer} netns {namespace} name eth0")
    else:
        ip(site.lab, node, f"link add {name} type {kind} peer name eth0 netns {namespace}")
    ip(site.lab, node, f"link set {name} up", f"-n {namespace} link set eth0 up")
    for text in addresses:
        one = ip_address(text)
        gateway, bits = gateways[one.version], one.max_prefixlen
        dad = " nodad" if one.version == 6 else ""
        ip(
            site.lab, node,
            f"address add {gateway}/{bits} dev {name}{dad}",
            f"-{one.version} route add {one}/{bits} dev {name}",
            f"-n {namespace} address add {one}/{bits} dev eth0{dad}",
            f"-n {namespace} -{one.version} route add {gateway}/{bits} dev eth0",
            f"-n {namespace} -{one.version} route add default via {gateway} dev eth0",
        )  # fmt: skip


def names_of(lab: Lab, host: str) -> set[str]:
    """The names of a host's interfaces."""
    return {one["ifname"] for one in json.loads(lab.run(host, ["ip", "-j", "link"]).stdout)}


def build_kindnet(site: Site, network: Network) -> None:
    """The layout of kindnet: a pair for each pod, and the same single gateway address on the node's end of each."""
    found = {}
    for number, pod in enumerate(network.pods, 2):
        addresses = [site.address(network, number, version) for version in (4, 6)]
        gateways = {version: site.address(network, 1, version) for version in (4, 6)}
        name = f"{network.kind}{secrets.token_hex(4)}"
        route_pair(site, NODE, name, site.namespace(pod), addresses, gateways, kind=network.kind)
        found[pod] = [ip_address(one) for one in addresses]
    site.settle(network, found)


def build_calico(site: Site, network: Network) -> None:
    """The layout of Calico: the node's end has no addresses, and answers for 169.254.1.1.

    For IPv6 it has its link-local address.
    """
    found = {}
    for number, pod in enumerate(network.pods, 2):
        name, namespace = f"cali{derived_hash(EndpointKey('Pod', 'shop', pod))}", site.namespace(pod)
        own4, own6 = (site.address(network, number, version) for version in (4, 6))
        ip(site.lab, NODE, f"link add {name} address {PARENT_MAC} type veth peer name eth0 netns {namespace}",
           f"link set {name} up", f"-n {namespace} link set eth0 up")  # fmt: skip
        site.lab.prober.write_settings(
            NODE, [(f"ipv4/conf/{name}/proxy_arp", "1"), (f"ipv4/neigh/{name}/proxy_delay", "0")]
        )
        ip(
            site.lab, NODE,
            f"route add {own4}/32 dev {name}", f"-6 route add {own6}/128 dev {name}",
            f"-n {namespace} address add {own4}/32 dev eth0", f"-n {namespace} address add {own6}/128 dev eth0 nodad",
            f"-n {namespace} route add 169.254.1.1 dev eth0", f"-n {namespace} route add default via 169.254.1.1 dev eth0",
            f"-n {namespace} -6 route add default via {link_local(site.lab, name)} dev eth0",
        )  # fmt: skip
        found[pod] = [ip_address(own4), ip_address(own6)]
    site.settle(network, found)


def link_local(lab: Lab, name: str) -> str:
    """The link-local address that the kernel gave to one of the node's interfaces."""

    def look() -> str | None:
        links = json.loads(lab.run(NODE, ["ip", "-6", "-j", "address", "show", "dev", name]).stdout)
        return next(
            (one["local"] for link in links for one in link.get("addr_info", ()) if one["scope"] == "link"), None
        )

    address: str = wait_for(look, f"{name} has a link-local address")
    return address


def build_aws(site: Site, network: Network) -> None:
    """The layout of AWS's plugin: no address on the node's end, the gateway's neighbour entry in the pod, and rules.

    Packets to a pod use the main table, and packets from it another table. If pods have security groups, both use a
    table of the pod's own.
    """
    (way_out,) = json.loads(site.lab.run(NODE, ["ip", "-j", "route", "show", "default"]).stdout)
    has_groups = network.name == "aws-vpc-groups"
    found = {}
    for number, pod in enumerate(network.pods, 2):
        prefix, table, to = ("vlan", 100 + number, f"{100 + number}") if has_groups else ("eni", number, "main")
        name, namespace = f"{prefix}{derived_hash(EndpointKey('Pod', 'shop', pod))}", site.namespace(pod)
        own = site.address(network, number, 4)
        ip(
            site.lab, NODE, f"link add {name} address {PARENT_MAC} type veth peer name eth0 netns {namespace}",
            f"link set {name} up", f"-n {namespace} link set eth0 up", f"route add {own}/32 dev {name} table {to}",
            f"route add default via {way_out['gateway']} dev eth0 onlink table {table}",
            f"rule add from all to {own} lookup {to} priority 512", f"rule add from {own} lookup {table} priority 1536",
            f"-n {namespace} address add {own}/32 dev eth0", f"-n {namespace} route add 169.254.1.1 dev eth0 scope link",
            f"-n {namespace} route add default via 169.254.1.1 dev eth0",
            f"-n {namespace} neigh add 169.254.1.1 lladdr {PARENT_MAC} dev eth0 nud permanent",
        )  # fmt: skip
        found[pod] = [ip_address(own)]
    site.settle(network, found)


NETWORKS = (
    Network("bridge", "host-local", "address (weak)", build_bridge),
    Network("bridge-static", "static", "address (weak)", build_bridge),
    Network(
        "bridge-vlan", "host-local", "address (weak)", build_bridge_vlan, kind="bridge", options="vlan_filtering 1"
    ),
    Network("bridge-inner", "host-local", "address (weak)", build_bridge_inner),
    Network("bridge-macvlan", "host-local", "address (weak)", build_bridge_macvlan, kind="macvlan"),
    Network("portmap", "host-local", "address (weak)", build_portmap),
    Network("ptp", "host-local", "route", build_ptp),
    Network("ptp-static", "static", "route", build_ptp),
    Network("flannel", "host-local", "address (weak)", build_flannel, kind="vxlan", options="id 99 dstport 4799"),
    Network("calico", "by hand", "name", build_calico, with_result=None),
    Network("aws-vpc", "by hand", "name", build_aws, with_result=None),
    Network("aws-vpc-groups", "by hand", "name", build_aws, with_result=None),
    Network("kindnet", "by hand", "route", build_kindnet, with_result=None),
    Network("netkit", "by hand", "route", build_kindnet, with_result=None, kind="netkit"),
    Network("macvlan", "host-local", "", build_on_master, kind="macvlan", plugin="macvlan"),
    Network("macvlan-lan", "static", "", build_macvlan_shim, kind="macvlan", plugin="macvlan"),
    Network("ipvlan", "host-local", "", build_on_master, kind="ipvlan", plugin="ipvlan"),
    Network("vlan", "static", "", build_vlan, kind="vlan", options="id 99", plugin="vlan"),
    Network("host-device", "static", "", build_host_device, plugin="host-device"),
)


# --- the node, its agent, and what is seen ------------------------------------------------------------------------------


@dataclass
class World:
    """All networks for which the kernel has devices, under an agent.

    ``answers``: by network. ``state``: the agent's status.
    """

    site: Site
    scene: Scene
    missing: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


LINKED = frozenset({"macvlan", "ipvlan", "vlan"})
"""Kinds of devices that are made on another device."""


def lacks(lab: Lab, network: Network) -> str:
    """The feature of a network that this kernel lacks; "": it has all of them."""
    below = LANS[0] if network.kind in LINKED else ""
    if has_device(lab, network.kind, *network.options.split(), below=below):
        return ""
    return f"this kernel has no {network.kind} devices" + (
        f" with {network.options}" if network.kind == "bridge" else ""
    )


@contextlib.contextmanager
def world(home: Path, *, is_late: bool, keeps_results: bool) -> Iterator[World]:
    """Build networks and an agent, and ask all questions without policy and under it.

    ``is_late``: the agent starts after the networks are built, with policy. Otherwise it starts before them, and policy
    comes last.
    """
    with lab_for(NODES) as lab:
        results = home / "results"
        results.mkdir(mode=0o700)
        site = Site(lab, home, results if keeps_results else None)
        prepare(site)
        options = ("--own-interfaces", LANS[0], "--cni-results", str(results))
        missing = {one.name: why for one in NETWORKS if (why := lacks(lab, one))}
        with scene_in(lab, home / "home", {"cluster.yaml": NODES}, options=options) as scene:
            found = World(site, scene, missing)
            if not is_late:
                scene.start()
                site.await_programs = lambda name: _await_programs(scene, name)
            try:
                look(found, is_late=is_late)
                yield found
            finally:
                site.close()


def _await_programs(scene: Scene, name: str) -> None:
    scene.await_status(
        lambda state: name in {one["interface"] for one in state["interfaces"]}, f"the programs are on {name}"
    )


def prepare(site: Site) -> None:
    """Add links and an address beside the pods' to the node, and routes from the world to the pods."""
    lab = site.lab
    for network in NETWORKS:
        master = MASTERS.get(network.name)
        if master not in LANS:
            continue
        ip(
            lab, NODE, f"link add {master} type veth peer name {master} netns {lab.namespace_of[INTERNET]}",
            f"link set {master} up", f"address add {site.address(network, 1, 4)}/24 dev {master}",
            f"address add {site.address(network, 1, 6)}/64 dev {master} nodad",
        )  # fmt: skip
        ip(lab, INTERNET, f"link set {master} up")
    ip(
        lab, INTERNET,
        f"route add 10.40.0.0/16 via {NODE_ADDRESS[4]} dev node0 onlink src {WORLD[4]}",
        f"-6 route add fd00:40::/32 via {NODE_ADDRESS[6]} dev node0 onlink src {WORLD[6]}",
    )  # fmt: skip
    for node in (NODE, FAR_NODE):
        lab.prober.write_settings(node, SETTINGS_ROUTER)
    world = [ip_address(one) for one in WORLD.values()]
    lab.prober.listen(INTERNET, world, [Listen(TCP, port) for port in (ALLOWED, DENIED)])


def look(found: World, *, is_late: bool) -> None:
    """Build all networks, and ask all questions without policy and under it."""
    site, scene = found.site, found.scene
    there = [one for one in NETWORKS if one.name not in found.missing]
    for network in there:
        network.build(site, network)
    scene.write("pods.yaml", "".join(one.render() for one in site.pods.values()))
    local = {pod.endpoint for pod in site.pods.values() if pod.node == NODE}
    if not is_late:
        scene.await_status(
            lambda state: local <= decided(state), "of each pod it is known where it is, or told that it is not"
        )
    before = ask_all(site, there)
    scene.write("policy.yaml", POLICY)
    if is_late:
        scene.start()
    found.state = scene.await_status(
        lambda state: state["objects"]["policies"] == 1 and local <= decided(state),
        "policy is in force where it can be",
    )
    forget_neighbours(site)  # neighbour discovery must also work under policy
    after = ask_all(site, there)
    for network in there:
        asked = site.questions[network.name]
        parts = [
            tuple(after[one] for one in part) for part in (asked.ingress_denied, asked.egress_denied, asked.allowed)
        ]
        found.answers[network.name] = Answers(tuple(before[one] for one in asked), *parts)


def forget_neighbours(site: Site) -> None:
    """Delete all neighbour entries except fixed ones."""
    states = [word for state in ("reachable", "stale", "delay", "probe") for word in ("nud", state)]
    for host in (INTERNET, NODE, FAR_NODE, *(pod.host for pod in site.pods.values())):
        for family in ("-4", "-6"):
            site.lab.run(host, ["ip", family, "neigh", "flush", *states])


def ask_all(site: Site, networks: Iterable[Network]) -> dict[Attempt, bool]:
    """Make real connections, all at the same time. Returns for each whether it was answered."""
    asked = [one for network in networks for one in site.questions[network.name]]
    return {one.attempt: one.reached for one in site.lab.attempt(asked)}


def decided(state: Mapping[str, Any]) -> set[str]:
    """The endpoints that are enforced, and those that are reported as not enforced."""
    enforced = {one["endpoint"] for one in state["endpoints"] if one["state"] == "enforced"}
    return enforced | {one["object"] for one in state["problems"] if one["slug"] in {"not-found", "interface"}}
