# SPDX-License-Identifier: Apache-2.0
"""`netpol-agent`: enforces the policies of a cluster, or of a directory of manifests, on the workloads of this node.

Enforcement continues when the agent ends, by whatever signal; the next agent takes over. `netpolctl cleanup` ends
enforcement. Invariant: all that can fail at the start is tried before any verdict changes; a failure is reported in one
line.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import grp
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from netpol_ebpf import __version__
from netpol_ebpf.agent import footprint
from netpol_ebpf.agent.answering import Answer
from netpol_ebpf.agent.configuration import add_config_option, origin_hint, parse_arguments
from netpol_ebpf.agent.control_socket import SOCKET_NAME, ControlSocket, Wait
from netpol_ebpf.agent.health import parse_health_address, served
from netpol_ebpf.agent.loop import AgentLoop, serve
from netpol_ebpf.agent.metrics import require_metrics_package
from netpol_ebpf.agent.service_manager import ServiceManager
from netpol_ebpf.agent.source_options import (
    NODE_VARIABLE,
    add_source_options,
    cluster_of,
    manifests_dir,
    node_name,
    plan_source,
)
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.errors import InvalidInputError, NetpolError, PlatformError, Problem, UnreachableError, UsageError
from netpol_ebpf.terminal import LOG_FORMATS, escaped, log_to_standard_error, paragraph, say

DEFAULT_STATE_DIR = Path("/run/netpol-ebpf")
"""Default state directory. It is on a tmpfs, so a reboot removes it, as it removes the pins."""
TUNNEL_PROTOCOLS = {"udp": 17, "ipip": 4, "ip6": 41, "gre": 47}
"""IP protocols that can carry other packets, by their names in --tunnel."""
BARRIER_MARKS = "0x20,0x40,0x10"
"""Default mark bits of the second barrier. No other known software uses them (ADR 13)."""
WORKLOAD_TO_HOST = {"allow": "allow", "deny": "deny", "policy": "pass"}
"""Maps each value of --workload-to-host to a value of `netpol_ebpf.policy.types.Action`."""
MOST_ENTRIES = 0xFFFF_FFFF
"""Largest max_entries of a map. The kernel has 32 bits for it, and would drop the upper bits of a larger number."""
PRIVATE_UMASK = 0o077
"""Umask for everything that the agent creates. Access for other users is granted explicitly."""
IN_USE_HINT = "Stop it, or give this one a --state-dir and a --pin-root of its own."
LOCK_NAME = "lock"
LEDGER_NAME = "numbers"
INTERFACES_NAME = "interfaces"
HANDOVERS_NAME = "handovers"
NAMES_NAME = "names"
DAY_S = 86_400
IN_FORCE = {"in_force": True}
"""The answer for which the CNI plugin waits (cni/agent.c)."""

log = logging.getLogger("netpol-agent")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="netpol-agent",
        description="Enforce the network policies of a cluster, or of a directory of manifests, on the workloads of this node.",
        epilog="exit codes: 0 done, 2 usage, 3 invalid objects (--once) or kubeconfig, 4 the API server cannot be read (--once), "
        "5 kernel, permission or missing package, 70 a bug. "
        "The configuration file and environment variables can give options, too: docs/configuration.md. "
        "Enforcement outlives the agent; `netpolctl cleanup` ends it.",
    )
    parser.add_argument("--version", action="version", version=f"netpol-agent {__version__}")
    add_config_option(parser)
    add_source_options(parser)
    parser.add_argument(
        "--node",
        metavar="NAME",
        help="name of this node: enforce for its pods (spec.nodeName); default: the environment variable "
        f"{NODE_VARIABLE}; with manifests alone and without a name, enforce for all pods found here",
    )
    parser.add_argument("--once", action="store_true", help="apply the objects, then exit; enforcement stays")
    parser.add_argument(
        "--pin-root",
        type=Path,
        metavar="DIR",
        help="directory in which the agent pins maps and programs (on a BPF file system; default: /sys/fs/bpf/netpol)",
    )
    parser.add_argument(
        "--state-dir", type=Path, default=DEFAULT_STATE_DIR, metavar="DIR",
        help=f"directory of the agent's socket and of the state that the next agent needs (default: {DEFAULT_STATE_DIR})",
    )  # fmt: skip
    parser.add_argument(
        "--workload-interfaces", action="append", default=[], metavar="PATTERN",
        help="interfaces of workloads (shell pattern, may be repeated); such an interface is closed until its pod is known; "
        "default: veths into other network namespaces, and taps, but not the node's own",
    )  # fmt: skip
    parser.add_argument(
        "--own-interfaces", action="append", default=[], metavar="PATTERN",
        help="interfaces of the node itself that look like those of workloads (shell pattern, may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--cni-results", type=Path, metavar="DIR",
        help="directory in which the runtime caches the results of CNI plugins (default: "
        "/var/lib/cni/results)",
    )  # fmt: skip
    parser.add_argument(
        "--map-size",
        action="append",
        default=[],
        metavar="MAP=ENTRIES",
        help="size of a map (may be repeated), such as np_addr4=1000000; a restarted agent makes the maps of policy anew in this size, "
        "other maps keep theirs",
    )
    parser.add_argument(
        "--timeout", action="append", default=[], metavar="STATE=SECONDS",
        help="idle time-out of connections (may be repeated), such as udp=180; states: tcp-new (no reply yet), tcp-open, "
        "tcp-closing, tcp-reset, udp, icmp, other, fragment (of a datagram)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-revoked", action="store_true", help="let connections that policy no longer allows go on until they end"
    )
    parser.add_argument(
        "--allow-source-prefixes", action="store_true",
        help="honour the annotation cni.projectcalico.org/allowedSourcePrefixes of pods",
    )  # fmt: skip
    parser.add_argument(
        "--workload-to-host", choices=tuple(WORKLOAD_TO_HOST), default="allow", metavar="WHAT",
        help="verdict for packets from workloads to their own node: allow (default), deny, or policy (of the wildcard host "
        "endpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--service-mark", metavar="MASK",
        help="16 adjacent bits of the packet mark that the agent may use, such as 0xffff0000; without the option, packets to "
        "services skip the TC programs of others that run after ours on a workload's interface",
    )  # fmt: skip
    parser.add_argument(
        "--tunnel", action="append", default=[], metavar="PROTOCOL[:PORT]",
        help="encapsulation that the cluster's nodes accept from any sender, such as udp:8472, ipip or gre (may be repeated): workloads "
        "may not send it to nodes, and between nodes it passes host endpoints; the agent knows that of this node's own devices",
    )  # fmt: skip
    parser.add_argument(
        "--router", action="append", default=[], metavar="NAMESPACE/NAME",
        help="a workload that routes for others (shell pattern, may be repeated): it may receive packets for other addresses, send "
        "router advertisements and answer DHCP",
    )  # fmt: skip
    parser.add_argument(
        "--hairpin", action="store_true",
        help="accept packets from outside with a source address of this node or its workloads, which some load balancers send back, "
        "and packets out of a tunnel with a source on another node than the one that sent them",
    )  # fmt: skip
    parser.add_argument(
        "--dns-server", action="append", default=[], metavar="SERVER",
        help="DNS server whose answers teach workloads the addresses of domain names in rules (may be repeated): ADDRESS[:PORT], "
        "[ADDRESS]:PORT or k8s-service:[NAMESPACE/]NAME[:PORT] (default: k8s-service:kube-system/kube-dns)",
    )  # fmt: skip
    parser.add_argument(
        "--name-ttl-floor", type=int, default=30, metavar="SECONDS",
        help="shortest time that an address counts for a domain name, whatever the TTL of the answer is (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--name-extra-ttl", type=int, default=0, metavar="SECONDS",
        help="time that is added to the TTL of every answer, for workloads that keep answers longer (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--unlearned-net", action="append", default=[], metavar="CIDR",
        help="prefix whose addresses no DNS answer can teach (may be repeated), such as the ranges of pods and services; addresses of "
        "nodes and services, loopback, link-local and multicast are always refused",
    )  # fmt: skip
    parser.add_argument(
        "--unread-dns", choices=("pass", "drop"), default="pass", metavar="WHAT",
        help="what happens to an answer of a DNS server that the program cannot read: pass (default; rules with domain names do not "
        "match its addresses) or drop",
    )  # fmt: skip
    parser.add_argument(
        "--barrier", choices=("nft", "off"), default="nft", metavar="WHAT",
        help="nft (default): nf_tables tables drop what a workload sends past its program, or before it has one; "
        "off: such packets pass",
    )  # fmt: skip
    parser.add_argument(
        "--barrier-interfaces", action="append", default=[], metavar="PATTERN",
        help="names of workloads' interfaces (a whole name, or a prefix and *, such as cali*; may be repeated) that are closed from "
        "creation, also while no agent runs; no interface of the node itself may have such a name",
    )  # fmt: skip
    parser.add_argument(
        "--barrier-marks", default=BARRIER_MARKS, metavar="SEEN,NODE,DUE",
        help=f"three single bits of the packet mark that the agent may use (default: {BARRIER_MARKS})",
    )  # fmt: skip
    parser.add_argument(
        "--group", metavar="NAME",
        help="group of users who may query the agent (netpolctl status, explain, flows, get, metrics) and read its maps; "
        "without the option, root alone may",
    )  # fmt: skip
    parser.add_argument(
        "--health-address", metavar="ADDRESS:PORT",
        help="serve /livez, /readyz and /metrics over HTTP at this address of the node, such as 127.0.0.1:9976, to whoever can connect to it; "
        "needs the extra [metrics] (default: serve nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--log-format", choices=tuple(LOG_FORMATS), default="text", metavar="FORMAT",
        help="format of the log on standard error: text (default), or json, one object a line",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log at level DEBUG")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = argparse.Namespace(debug=False, origins={})
    try:
        arguments = parse_arguments(build_parser(), argv)
        log_to_standard_error(arguments.log_format, logging.DEBUG if arguments.verbose else logging.INFO)
        return run(arguments)
    except NetpolError as error:
        if arguments.debug:
            say(traceback.format_exc(), file=sys.stderr)
        say(paragraph(f"netpol-agent: error: {error.message}"), file=sys.stderr)
        for hint in (origin_hint(error.message, arguments.origins), error.hint):
            if hint:
                say(paragraph(f"netpol-agent: hint: {hint}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:  # such as no room or no permission: a fault of the machine, not a bug
        if arguments.debug:
            say(traceback.format_exc(), file=sys.stderr)
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        say(escaped(f"netpol-agent: error: {what}; what is in force stays in force"), file=sys.stderr)
        return PlatformError.exit_code
    except Exception as error:  # noqa: BLE001 - the one place where a bug becomes a line and an exit code
        if arguments.debug:
            say(traceback.format_exc(), file=sys.stderr)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"netpol-agent: bug: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        say(paragraph(f"{message}; what is in force stays in force"), file=sys.stderr)
        return NetpolError.exit_code


def run(arguments: argparse.Namespace) -> int:
    """Run the agent until it ends; returns the exit code. Raises NetpolError."""
    # Imported here, because --help must work without BCC, root and a kernel.
    from netpol_ebpf.agent.barrier import parse_barrier
    from netpol_ebpf.agent.core import Agent
    from netpol_ebpf.agent.dns_servers import DEFAULT_SERVERS, parse_dns_server
    from netpol_ebpf.agent.node import KernelNode
    from netpol_ebpf.agent.settings import AgentSettings
    from netpol_ebpf.agent.timeouts import parse_timeouts
    from netpol_ebpf.policy.types import Action
    from netpol_loader.pins import doctor
    from netpol_loader.pins.dataplane import DEFAULT_PIN_ROOT

    sizes = parse_sizes(arguments.map_size)
    timeouts_s = parse_timeouts(arguments.timeout)
    group = parse_group(arguments.group)
    mark_shift = parse_mark(arguments.service_mark)
    pin_root: Path = arguments.pin_root or DEFAULT_PIN_ROOT
    state_dir: Path = arguments.state_dir
    health_address = parse_health_address(arguments.health_address)
    if health_address is not None:
        require_metrics_package()
    arguments.manifests = manifests_dir(arguments)
    node_of_pods = node_name(arguments)
    open_source = plan_source(arguments, state_dir)
    doctor.require_all(pin_root)
    settings = AgentSettings(
        node=node_of_pods,
        interfaces=tuple(arguments.workload_interfaces),
        own_interfaces=tuple(arguments.own_interfaces),
        borrow_sources=arguments.allow_source_prefixes,
        keep_revoked=arguments.keep_revoked,
        workload_to_host=Action(WORKLOAD_TO_HOST[arguments.workload_to_host]),
        mark_shift=mark_shift,
        tunnels=frozenset(map(parse_tunnel, arguments.tunnel)),
        routers=tuple(map(parse_router, arguments.router)),
        hairpin=arguments.hairpin,
        name_ttl_floor_s=parse_ttl("--name-ttl-floor", arguments.name_ttl_floor),
        name_extra_ttl_s=parse_ttl("--name-extra-ttl", arguments.name_extra_ttl),
        dns_servers=tuple(map(parse_dns_server, arguments.dns_server or DEFAULT_SERVERS)),
        unlearned_nets=tuple(map(parse_unlearned_net, arguments.unlearned_net)),
        unread_dns=arguments.unread_dns,
        barrier=parse_barrier(arguments.barrier, arguments.barrier_interfaces, arguments.barrier_marks, mark_shift),
    )
    os.umask(PRIVATE_UMASK)
    footprint.give_back_large_blocks()
    footprint.collect_rarely()
    ledger = Ledger(state_dir / LEDGER_NAME)
    kernel_node = KernelNode(pin_root, sizes, group=group, timeouts_s=timeouts_s, plugin_results=arguments.cni_results)
    with exclusive(state_dir), claimed(pin_root), kernel_node as node, contextlib.ExitStack() as stack:
        stack.callback(ledger.close)
        source = stack.enter_context(contextlib.closing(open_source(not node.attached())))
        open_to_group(state_dir, pin_root, group)
        agent = Agent(
            settings, node, source, ledger, time.monotonic, state_dir / INTERFACES_NAME, state_dir / HANDOVERS_NAME,
            state_dir / NAMES_NAME,
        )  # fmt: skip
        stack.callback(agent.domain_names.close)

        def tell_in_force() -> None:
            footprint.freeze()
            log.info(
                "in force: %d policies; %d of %d local endpoints have their interface; pinned in %s",
                len(agent.objects.world.policies), len(agent.enforcement.applier.bindings), len(agent.objects.local), node.pin_dir,
            )  # fmt: skip

        if arguments.once:
            agent.start()
            tell_in_force()
            slugs = {problem.slug for problem in agent.problems if problem.severity == "error"}
            if "attach" in slugs:
                return PlatformError.exit_code
            return InvalidInputError.exit_code if slugs else 0
        health = stack.enter_context(served(health_address, state_dir / SOCKET_NAME, arguments.log_format))
        agent.begin()
        place = {
            "pid": os.getpid(),
            "manifests": None if arguments.manifests is None else str(arguments.manifests.resolve()),
            "pin_dir": str(node.pin_dir),
            "upgrade": node.upgraded,
        }
        look, problems = begin_reporting(agent, stack)
        answers = answers_of(agent, node, ledger, place, problems)
        control_socket = ControlSocket(state_dir / SOCKET_NAME, answers, group, waits_of(agent))
        manager = ServiceManager.of_environment()
        faulthandler.enable()  # SIGABRT, which a watchdog sends, logs where the loop hangs
        serve(AgentLoop(agent, node, ledger, control_socket, tell_in_force, manager, look, health=health))
    return 0


@contextlib.contextmanager
def claimed(pin_root: Path) -> Iterator[None]:
    """Create a pin root and hold its lock, so that only one agent or `netpolctl cleanup` uses it.

    Raises PlatformError.
    """
    from netpol_loader.pins import doctor
    from netpol_loader.pins.lock import held

    doctor.require_bpffs(pin_root)
    pin_root.mkdir(parents=True, exist_ok=True)
    with held(pin_root, hint=IN_USE_HINT):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # removes the directory only if it has no pins
                pin_root.rmdir()


def open_to_group(state_dir: Path, pin_root: Path, group: int | None) -> None:
    """Let members of the group enter the state directory, to connect to the socket there. Raises PlatformError."""
    from netpol_loader.pins import access

    try:
        if group is not None:
            os.chown(state_dir, -1, group)
        state_dir.chmod(0o700 if group is None else 0o710)
    except PermissionError as error:
        raise PlatformError(
            f"cannot give {state_dir} to the group with the number {group}: {error.strerror}",
            hint="The directory must belong to the agent's user, and that one to the group (systemd: SupplementaryGroups=).",
        ) from error
    closed = None if group is None else access.closed_parent(pin_root, group)
    if closed is not None:
        log.warning(
            "members of the group can connect to the agent but cannot read its maps: they may not enter %s (chgrp and chmod g+x open it)",
            closed,
        )


def begin_reporting(
    agent: Any, stack: contextlib.ExitStack
) -> tuple[Callable[[], None], Callable[[], Iterable[Problem]]]:
    """Start to report to the cluster that the agent watches. Closing ``stack`` ends it.

    Returns two functions: the first must be called after each step of the agent, the second returns the problems of
    reporting. Without a cluster both do nothing.
    """
    cluster, node = cluster_of(agent.source), agent.settings.node
    if cluster is None or node is None:
        return (lambda: None), tuple
    from netpol_ebpf.agent.reporting import Reporting

    reporting = Reporting(agent, cluster, node)
    stack.callback(reporting.close)
    reporting.start()
    return reporting.look, lambda: reporting.problems


def answers_of(
    agent: Any,
    node: Any,
    ledger: Ledger,
    place: Mapping[str, Any],
    others: Callable[[], Iterable[Problem]] = tuple,
) -> dict[str, Answer]:
    """The functions that answer requests to the agent, by the name of the operation.

    Children of this process run them (`netpol_ebpf.agent.answering`). ``place``: see `report.status`. ``others``:
    returns problems that are not the agent's own.
    """
    from netpol_ebpf.agent import report
    from netpol_ebpf.agent.policies_in_force import standing_here
    from netpol_ebpf.agent.questions import answer_question

    def asked(answer: Answer) -> Answer:
        def in_child(request: Mapping[str, Any]) -> Any:
            node.barrier.part()
            if not agent.is_started:
                raise UnreachableError(
                    agent.problems[-1].message, hint="Ask again later; `netpolctl status` says more."
                )
            return answer(request)

        return in_child

    def apart(answer: Callable[[], Any]) -> Answer:
        return asked(lambda _request: answer())

    def status(_request: Mapping[str, Any]) -> Any:
        if not agent.is_started:
            return report.waiting(agent, place, (*ledger.problems, *others()))
        node.barrier.part()
        return report.status(agent, node.maps, place, (*ledger.problems, *others()), node.network.listed_again)

    def metrics(request: Mapping[str, Any]) -> Any:
        return report.metrics(agent, node.maps, status(request))

    return {
        "status": status,
        "metrics": metrics,
        "rules": apart(lambda: report.rules(agent, node.maps)),
        "dns": apart(agent.domain_names.report),
        "identities": apart(lambda: report.identities(agent)),
        "connections": apart(lambda: report.connections(agent, node.maps)),
        "explain": asked(lambda request: answer_question(agent, request)),
        "policy": asked(lambda request: standing_here(agent, request)),
    }


def waits_of(agent: Any, clock: Callable[[], float] = time.monotonic) -> dict[str, Callable[[Mapping[str, Any]], Wait]]:
    """The functions that start waiting for a state, by the name of the operation.

    The CNI plugin uses ``attach`` and ``ready``, `netpolctl release` uses ``release``. The agent's own loop runs them.
    ``clock``: returns the time in seconds.
    """
    from netpol_ebpf.agent.handover import parse_attach

    def attach(request: Mapping[str, Any]) -> Wait:
        handed, wait_s = parse_attach(request)
        deadline_s = clock() + wait_s
        agent.hand_over(handed)

        def look() -> Any:
            missing = agent.missing_for(handed)
            if missing and clock() >= deadline_s:
                message = f"{handed.pod} is not under policy within {wait_s} s: {missing}"
                log.warning("the CNI plugin gets no yes: %s", message)
                raise UnreachableError(message, hint="Try again.")
            return None if missing else IN_FORCE

        return look

    def is_ready() -> Any:
        if not agent.is_started:
            raise UnreachableError(agent.problems[-1].message, hint="Try again.")
        return IN_FORCE

    def release(request: Mapping[str, Any]) -> Wait:
        kind, is_trial = request.get("kind"), request.get("dry_run")
        if not isinstance(kind, str) or not isinstance(is_trial, bool):
            raise UsageError("a release names a kind, and says whether it is a dry run")
        names = agent.release(kind, is_trial=is_trial)
        rejected = agent.rejected.problem if agent.is_started and not is_trial else None
        return lambda: {"released": list(names), "rejected": None if rejected is None else rejected.message}

    return {"attach": attach, "ready": lambda _request: is_ready, "release": release}


@contextlib.contextmanager
def exclusive(state_dir: Path, *, hint: str = IN_USE_HINT) -> Iterator[None]:
    """Hold the lock of a state directory within the context, so that only one agent uses the directory.

    The kernel ends the lock with the process. Raises PlatformError, with ``hint``, if another agent runs.
    """
    from netpol_loader.pins.lock import locked_alone

    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    os.fchmod(fd, 0o600)  # a process that can open the file can hold the lock; a group may enter the directory
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_alone(fd))
        except BlockingIOError as error:
            raise PlatformError(f"another netpol-agent uses {state_dir}", hint=hint) from error
        yield


def parse_mark(text: str | None) -> int:
    """Parse a mask of 16 adjacent bits; returns the position of its lowest bit, 0 without a mask. Raises UsageError."""
    if text is None:
        return 0
    try:
        mask = int(text, 0)
    except ValueError:
        mask = 0
    shift = (mask & -mask).bit_length() - 1
    if not 1 <= shift <= 16 or mask != 0xFFFF << shift:  # noqa: PLR2004 - a mark has 32 bits
        raise UsageError(f"--service-mark {text}: expected 16 adjacent bits above the lowest one, such as 0xffff0000")
    return shift


def parse_tunnel(text: str) -> tuple[int, int]:
    """Parse ``udp:PORT`` or the name of an IP protocol; returns (protocol number, port or 0). Raises UsageError."""
    name, _, port = text.lower().partition(":")
    if name == "udp" and port.isdecimal() and 0 < int(port) <= 0xFFFF:  # noqa: PLR2004 - a port has 16 bits
        return TUNNEL_PROTOCOLS["udp"], int(port)
    if name != "udp" and name in TUNNEL_PROTOCOLS and not port:
        return TUNNEL_PROTOCOLS[name], 0
    others = ", ".join(one for one in TUNNEL_PROTOCOLS if one != "udp")
    raise UsageError(f"--tunnel {text}: expected udp:PORT, or one of {others}")


def parse_router(text: str) -> str:
    """Parse a pattern of ``NAMESPACE/NAME``. Raises UsageError for others, which would match no workload."""
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise UsageError(f"--router {text}: expected NAMESPACE/NAME, such as network/router or network/*")
    return text


def parse_ttl(option: str, seconds: int) -> int:
    """Check a number of seconds, which may be a day at most. Raises UsageError."""
    if not 0 <= seconds <= DAY_S:
        raise UsageError(f"{option} {seconds}: must be 0 to {DAY_S} seconds")
    return seconds


def parse_unlearned_net(text: str) -> IPv4Network | IPv6Network:
    """Parse a prefix. Raises UsageError."""
    try:
        return ip_network(text)
    except ValueError as error:
        raise UsageError(f"--unlearned-net {text}: {error}") from None


def parse_group(name: str | None) -> int | None:
    """Parse a group's name or number; returns its id, None if no group is given. Raises UsageError."""
    if name is None:
        return None
    try:
        return grp.getgrgid(int(name)).gr_gid if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, OverflowError) as error:
        raise UsageError(f"--group {name}: there is no such group", hint="groupadd --system NAME") from error


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Parse options of the form ``MAP=ENTRIES``; returns the number of entries by map name. Raises UsageError."""
    from netpol_loader.tables.buckets import SIZED

    sizes: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        is_number = number.isascii() and number.isdecimal() and len(number) <= len(str(MOST_ENTRIES))
        if name not in SIZED or not is_number or not 1 <= int(number) <= MOST_ENTRIES:
            known = ", ".join(SIZED)
            raise UsageError(
                f"--map-size {text}: expected MAP=ENTRIES, with a number from 1 to {MOST_ENTRIES} and a map of {known}"
            )
        sizes[name] = int(number)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
