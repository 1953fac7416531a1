# SPDX-License-Identifier: Apache-2.0
"""A kube-apiserver and its etcd on loopback, with all their state in one directory, and the requests of tests.

There is no controller manager, scheduler or kubelet. The administrator can make requests in the name of any user.

Invariant: `Server.close` ends both programs, even if the start failed.
"""

from __future__ import annotations

import copy
import http.client
import json
import socket
import ssl
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
"""Time limit of a start in seconds, on a busy machine; arbitrary."""
TOKEN = "administrator"


@dataclass(frozen=True)
class Answer:
    """The answer to a request: HTTP status, JSON body, and the warnings in its headers."""

    status: int
    body: Any
    warnings: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """The message of a Status; "" if the body is something else."""
        return self.body.get("message", "") if isinstance(self.body, dict) else str(self.body)


class Server:
    """Both programs. The constructor starts them."""

    def __init__(self, apiserver: Path, etcd: Path, directory: Path, *, flags: Sequence[str] = ()) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = directory
        self._connection: http.client.HTTPSConnection | None = None
        self._authority = directory / "pki" / "apiserver.crt"
        try:
            self._start(apiserver, etcd, flags)
        except BaseException:
            self.close()
            raise

    def _start(self, apiserver: Path, etcd: Path, flags: Sequence[str]) -> None:
        self.port, client, peer = free_ports(3)
        self._etcd_port = client
        keys = self._directory / "pki"
        keys.mkdir(parents=True)
        for command in (
            ["openssl", "genrsa", "-out", keys / "accounts.key", "2048"],
            ["openssl", "rsa", "-in", keys / "accounts.key", "-pubout", "-out", keys / "accounts.pub"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        (keys / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        self._spawn(
            "etcd",
            [
                str(etcd),
                f"--data-dir={self._directory / 'data'}",
                f"--listen-client-urls=http://127.0.0.1:{client}",
                f"--advertise-client-urls=http://127.0.0.1:{client}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-cluster=default=http://127.0.0.1:{peer}",
            ],
        )
        self._spawn(
            "apiserver",
            [
                str(apiserver),
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                f"--secure-port={self.port}",
                f"--etcd-servers=http://127.0.0.1:{client}",
                f"--cert-dir={keys}",
                f"--token-auth-file={keys / 'tokens.csv'}",
                "--authorization-mode=RBAC",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={keys / 'accounts.pub'}",
                f"--service-account-signing-key-file={keys / 'accounts.key'}",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--endpoint-reconciler-type=none",
                *flags,
            ],
        )
        self.wait_for(lambda: self._is_ready(), "the server is ready")

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self._directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory)
            )

    def _is_ready(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args} ended early: {self.log()}")
        with suppress(OSError, http.client.HTTPException):
            return self.get("/readyz").status == 200 and self.get("/apis").status == 200
        return False

    def log(self) -> str:
        """The end of both logs."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self._directory.glob("*.log")))

    def version(self) -> str:
        """The version that the API server reports, and the version that it emulates if that is another."""
        said = self.get("/version").body
        emulated = f"{said.get('emulationMajor', said['major'])}.{said.get('emulationMinor', said['minor'])}"
        behaves = "" if emulated == f"{said['major']}.{said['minor']}" else f" as {emulated}"
        return f"{said['gitVersion']}{behaves}"

    def etcd_version(self) -> str:
        """The version that etcd reports."""
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=60)
        connection.request("GET", "/version")
        version = json.loads(connection.getresponse().read())["etcdserver"]
        connection.close()
        return str(version)

    def close(self) -> None:
        """End both programs."""
        if self._connection is not None:
            self._connection.close()
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def for_thread(self) -> Iterator[Server]:
        """Yield the same server with a connection of its own, for another thread."""
        other = copy.copy(self)
        other._connection = None
        try:
            yield other
        finally:
            if other._connection is not None:
                other._connection.close()

    # --- requests ---------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        user: str | None = None,
        groups: Sequence[str] = (),
        content_type: str = "application/json",
        accept: str = "application/json",
        **query: str,
    ) -> Answer:
        """Make a request, as the administrator or in a user's name. Raises OSError if the server does not answer."""
        headers = [("Authorization", f"Bearer {TOKEN}"), ("Content-Type", content_type), ("Accept", accept)]
        if user is not None:
            headers.append(("Impersonate-User", user))
            headers += [("Impersonate-Group", group) for group in ("system:authenticated", *groups)]
        target = path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        is_old = self._connection is not None
        if self._connection is None:
            context = ssl.create_default_context(cafile=str(self._authority))
            self._connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        try:
            self._connection.putrequest(method, target)
            for name, value in headers:
                self._connection.putheader(name, value)
            data = b"" if body is None else json.dumps(body).encode()
            self._connection.putheader("Content-Length", str(len(data)))
            self._connection.endheaders(data)
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self._connection = None
            if is_old and isinstance(error, http.client.RemoteDisconnected):  # closed by the server as idle
                return self.request(
                    method, path, body, user=user, groups=groups, content_type=content_type, accept=accept, **query
                )
            raise
        kind = response.headers.get_content_type()
        warnings = tuple(response.headers.get_all("Warning", ()))
        return Answer(response.status, json.loads(text) if kind == "application/json" else text.decode(), warnings)

    def get(self, path: str, **options: Any) -> Answer:
        """Make a GET request."""
        return self.request("GET", path, **options)

    def apply(self, obj: Mapping[str, Any], **options: Any) -> Answer:
        """Create or change an object by server-side apply."""
        path = f"{collection(obj)}/{obj['metadata']['name']}"
        options.setdefault("content_type", "application/apply-patch+yaml")
        return self.request("PATCH", path, obj, fieldManager="tests", force="true", **options)

    def create(self, obj: Mapping[str, Any], **options: Any) -> Answer:
        """Create an object."""
        return self.request("POST", collection(obj), obj, **options)

    def wait_for(self, is_true: Callable[[], bool], what: str) -> None:
        """Poll until a condition is true. Raises TimeoutError after `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not in {PATIENCE_S:.0f} s: {what}\n{self.log()}")
            time.sleep(0.05)


PLURALS = {
    "NetworkPolicy": "networkpolicies",
    "GlobalNetworkPolicy": "globalnetworkpolicies",
    "StagedNetworkPolicy": "stagednetworkpolicies",
    "StagedGlobalNetworkPolicy": "stagedglobalnetworkpolicies",
    "StagedKubernetesNetworkPolicy": "stagedkubernetesnetworkpolicies",
    "AdminNetworkPolicy": "adminnetworkpolicies",
    "BaselineAdminNetworkPolicy": "baselineadminnetworkpolicies",
    "ClusterNetworkPolicy": "clusternetworkpolicies",
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "MutatingAdmissionPolicy": "mutatingadmissionpolicies",
}
"""The plural names that are not the name with an s."""
CLUSTER_WIDE = (
    *("Namespace", "Node", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
    *("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"),
    *("GlobalNetworkPolicy", "StagedGlobalNetworkPolicy", "GlobalNetworkSet", "Tier", "HostEndpoint", "Profile"),
    *("FelixConfiguration", "KubeControllersConfiguration"),
    *("AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy"),
)


def collection(obj: Mapping[str, Any]) -> str:
    """The path of the collection of an object's kind and namespace."""
    version, kind = obj["apiVersion"], obj["kind"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    if kind not in CLUSTER_WIDE:
        root += f"/namespaces/{obj['metadata'].get('namespace', 'default')}"
    return f"{root}/{PLURALS.get(kind, kind.lower() + 's')}"


def free_ports(count: int) -> list[int]:
    """Unused ports of loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
