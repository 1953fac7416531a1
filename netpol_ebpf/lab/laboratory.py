# SPDX-License-Identifier: Apache-2.0
"""Builds a planned network of namespaces, runs processes and connections in it, and removes it again.

Invariants: names contain a random token, so laboratories do not collide. Every interface is created inside a namespace
of the laboratory, so the machine's own interfaces are never touched. Every namespace and directory is recorded with the
guard process before its creation, so the guard removes it however this process ends. The laboratory needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Union

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_ebpf.lab import guard
from netpol_ebpf.lab.attempt import Attempt, AttemptResult
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.probe import DEADLINE_S, Prober
from netpol_ebpf.lab.topology import Host, IpBatch, Plan

STOP_DEADLINE_S = 60.0
LINKS_DEADLINE_S = 30.0
POLL_S = 0.02
RUN_DEADLINE_S = 120.0  # an agent with --once compiles the program, which takes long on a busy machine
GUARD_DEADLINE_S = 15.0
TOOLS = {"ip": "iproute2", "nsenter": "util-linux"}
_File = Union[int, IO[bytes], IO[str], None]

# These are written before any interface exists, so that "default" applies to all interfaces.
SETTINGS_ALL = (
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/default/accept_dad", "0"),  # an address is usable at once
    ("ipv6/conf/default/dad_transmits", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv4/ping_group_range", "0 2147483647"),  # echo requests from datagram sockets
    # The reverse path filter is off, because only the program under test may drop packets.
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
)
SETTINGS_ROUTER = (("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"))


class Lab:
    """A running laboratory; a context manager.

    ``directories``: directories to remove together with the laboratory, such as the pin directory of the agent under
    test. Raises PrivilegeError without root, PlatformError if a tool is missing or a step fails. In both cases
    everything that was built is removed.
    """

    def __init__(self, hosts: Iterable[Host] | Plan, *, directories: Sequence[Path] = ()) -> None:
        self.plan = hosts if isinstance(hosts, Plan) else Plan(hosts)
        self.token = f"np{secrets.token_hex(3)}"
        self.directories = tuple(directories)
        self.namespace_of = {name: f"{self.token}-{name.replace('/', '.')}" for name in self.plan.hosts}
        self._guard: subprocess.Popen[str] | None = None
        self._prober: Prober | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:  # noqa: PYI034 - typing.Self comes with Python 3.11
        self.build()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- building and removing ------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the namespaces, links, addresses and routes, and start the echo servers."""
        if os.geteuid() != 0:
            raise PrivilegeError("the laboratory makes network namespaces, which needs root")
        for tool, package in TOOLS.items():
            if shutil.which(tool) is None:
                raise PlatformError(f"{tool} is not installed", hint=f"Install the package {package}.")
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-m", guard.__name__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self.record(namespaces=self.namespace_of.values(), directories=self.directories)
        _run_batch(["ip", "-batch", "-"], "".join(f"netns add {name}\n" for name in self.namespace_of.values()))
        self._prober = Prober(self.namespace_of)
        for host in self.plan.hosts.values():
            router = SETTINGS_ROUTER if self.plan.children(host.name) else ()
            self._prober.write_settings(host.name, SETTINGS_ALL + router)
        for batch in self.plan.render_batches(self.namespace_of):
            self._run_batch(batch)
        self._await_links()
        for host in self.plan.hosts.values():
            self._prober.listen(host.name, host.addresses, host.listens)

    def _await_links(self) -> None:
        """Wait until every interface of the plan can send.

        After the peer of a veth came up, a kernel worker must notice that before the veth can send. That takes a while
        if other processes create and remove namespaces; until then the veth silently drops all packets. Interfaces
        outside the plan do not count: a kernel with built-in tunnels puts `sit0` and similar interfaces into every new
        namespace, and these are never up.
        """
        deadline = time.monotonic() + scaled(LINKS_DEADLINE_S)
        for host in self.plan.hosts:
            made = self.plan.interfaces(host)
            while silent := made - self._sending(host):
                if time.monotonic() > deadline:
                    raise PlatformError(f"lab: interfaces of {host} are not in operation: {', '.join(sorted(silent))}")
                time.sleep(scaled(POLL_S))

    def _sending(self, host: str) -> set[str]:
        """Names of the host's interfaces that are operationally up."""
        links = json.loads(self.run(host, ["ip", "-json", "link", "show"]).stdout)
        return {link["ifname"] for link in links if link["operstate"] == "UP"}

    def _run_batch(self, batch: IpBatch) -> None:
        # The family is an option of the whole command, so successive lines of one family become one command.
        runs: list[tuple[str, list[str]]] = []
        for line in batch.lines:
            family, text = (line[:2], line[3:]) if line.startswith("-") else ("", line)
            if not runs or runs[-1][0] != family:
                runs.append((family, []))
            runs[-1][1].append(text)
        for family, lines in runs:
            options = [family] if family else []
            _run_batch(self.command(batch.host, ["ip", *options, "-batch", "-"]), "\n".join(lines) + "\n")

    def record(self, *, namespaces: Iterable[str] = (), directories: Iterable[Path] = ()) -> None:
        """Record namespaces and directories that the guard must remove.

        Must be called before they are created, so that the guard removes them even if this process dies.
        """
        if self._guard is None or self._guard.stdin is None:
            raise PlatformError("the laboratory is not running")
        record = {"namespaces": list(namespaces), "directories": [str(path) for path in directories]}
        self._guard.stdin.write(json.dumps(record) + "\n")
        self._guard.stdin.flush()

    def close(self) -> None:
        """End all processes, and remove all namespaces and directories. Calling it again has no effect.

        Raises PlatformError with the names of objects that could not be removed.
        """
        for process in reversed(self._processes):
            _stop(process)
        self._processes.clear()
        if self._prober is not None:
            self._prober.close()
            self._prober = None
        warden, self._guard = self._guard, None
        if warden is None:
            return
        if warden.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # the guard was killed; its return code is checked below
                warden.stdin.close()
        try:
            code = warden.wait(scaled(GUARD_DEADLINE_S))
        except subprocess.TimeoutExpired:
            warden.kill()
            code = warden.wait()
        if code != 0 and (failures := guard.remove(self.namespace_of.values(), self.directories)):
            raise PlatformError("the laboratory could not be removed: " + "; ".join(failures))

    # --- using it ---------------------------------------------------------------------------------------------------

    @property
    def prober(self) -> Prober:
        """The prober that makes the laboratory's connections and runs its echo servers."""
        if self._prober is None:
            raise PlatformError("the laboratory is not running")
        return self._prober

    def attempt(
        self, attempts: Sequence[Attempt], *, deadline_s: float = DEADLINE_S, rounds: int = 2
    ) -> list[AttemptResult]:
        """Make real connections, all at the same time; see `Prober.attempt`."""
        return self.prober.attempt(attempts, deadline_s=deadline_s, rounds=rounds)

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` inside a host's network namespace.

        It uses `nsenter`. `ip netns exec` and `ip -n` would also mount a new /sys, which hides the BPF file system, and
        fail if / is not a mount point.
        """
        return ["nsenter", f"--net={guard.NETNS_DIR / self.namespace_of[host]}", "--", *argv]

    def run(
        self, host: str, argv: Sequence[str], *, timeout_s: float = RUN_DEADLINE_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host's namespace and wait for its end.

        Raises TimeoutExpired; raises CalledProcessError if ``check`` and the command fails.
        """
        return subprocess.run(
            self.command(host, argv),
            check=check,
            timeout=scaled(timeout_s),
            capture_output=True,
            text=True,
            errors="replace",
        )

    def start(
        self,
        host: str,
        argv: Sequence[str],
        *,
        stdout: _File = subprocess.DEVNULL,
        stderr: _File = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a host's namespace. Closing the laboratory ends the process.

        The process has its own session, so Ctrl-C at the terminal reaches only the builder of the laboratory.
        """
        process = subprocess.Popen(
            self.command(host, argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """End a process that `start` returned: by SIGTERM, then by SIGKILL if it does not end.

        Returns the exit code of the process.
        """
        if process in self._processes:
            self._processes.remove(process)
        return _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(scaled(STOP_DEADLINE_S))
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _run_batch(command: Sequence[str], text: str) -> None:
    done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise PlatformError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}",
            hint="The laboratory needs network namespaces and veth interfaces; is this a container without them?",
        )
