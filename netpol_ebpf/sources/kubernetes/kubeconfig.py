# SPDX-License-Identifier: Apache-2.0
"""Reads kubeconfig files (clusters, users and contexts) as kubectl does, for an agent outside a pod.

Several files (``KUBECONFIG=a:b``) are merged as kubectl merges them: of several entries with the same name the first is
used, and so is the first current-context. Relative paths are relative to the file that contains them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from netpol_ebpf.errors import InvalidInputError, UnreachableError
from netpol_ebpf.resources.yamltree import read_documents
from netpol_ebpf.sources.kubernetes.client import Cluster, Credentials, bearer, in_cluster, read_token

DEFAULT = Path("~/.kube/config")
EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
EXEC_S = 60.0
"""Time limit in seconds for an exec plugin. The number is arbitrary; most plugins query a server."""
EXPIRY_MARGIN = timedelta(seconds=10)
"""How long before their expiry the credentials of a plugin are renewed."""


def find_cluster(path: str = "", context: str = "", environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that kubectl would use: from ``path``, KUBECONFIG, ~/.kube/config, or the pod of this process.

    Raises InvalidInputError if there is none, or if the configuration is not valid.
    """
    named = path or environment.get("KUBECONFIG", "")
    if named:
        return load_kubeconfig([Path(one).expanduser() for one in named.split(os.pathsep) if one], context)
    default = DEFAULT.expanduser()
    if default.exists() or context:
        return load_kubeconfig([default], context)
    return in_cluster(environment=environment)


def load_kubeconfig(paths: Sequence[Path], context: str = "") -> Cluster:
    """The cluster of a context, "" for the current context.

    Raises InvalidInputError, which names the file and the error.
    """
    config = _Config.read(paths)
    name = context or config.current
    if not name:
        raise config.error("no context is current", hint="Name one with --context.")
    chosen = config.entry("contexts", "context", name)
    cluster = config.entry("clusters", "cluster", chosen.text("cluster"))
    user = chosen.text("user")
    return _cluster(cluster, config.entry("users", "user", user) if user else None)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A named entry of a kubeconfig file, or a part of one. ``where``: its position in the file, for messages."""

    file: Path
    where: str
    value: Mapping[str, Any]

    def error(self, message: str) -> InvalidInputError:
        return InvalidInputError(f"{self.file}: {self.where}: {message}", hint="Correct the kubeconfig.")

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(f"{key} must be text")
        return value

    def boolean(self, key: str) -> bool:
        value = self.value.get(key)
        if not isinstance(value, (bool, type(None))):
            raise self.error(f"{key} must be true or false")
        return bool(value)

    def part(self, key: str) -> _Entry | None:
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"{key} must be a mapping")
        return _Entry(self.file, f"{self.where}.{key}", value)

    def path(self, key: str) -> Path | None:
        text = self.text(key)
        return self.file.parent / text if text else None

    def inline(self, key: str) -> bytes:
        """The decoded value of a base64 field."""
        try:
            return base64.b64decode(self.text(key), validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.error(f"{key} is not base64 ({error})") from error

    def read(self, name: str) -> bytes:
        """The decoded field NAME-data or, without it, the content of the file that the field NAME names.

        Raises OSError.
        """
        inline = self.inline(f"{name}-data")
        path = self.path(name)
        return inline if inline or path is None else path.read_bytes()


@dataclass(slots=True)
class _Config:
    paths: Sequence[Path]
    current: str = ""
    entries: dict[tuple[str, str], _Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> _Config:
        config = cls(paths)
        found = [path for path in paths if path.exists()]  # kubectl skips a missing file where several are named
        for path in found:
            config.merge(path)
        if not found:
            raise config.error("there is no such file")
        return config

    def error(self, message: str, hint: str = "Correct the kubeconfig.") -> InvalidInputError:
        return InvalidInputError(f"{os.pathsep.join(map(str, self.paths))}: {message}", hint=hint)

    def entry(self, section: str, key: str, name: str) -> _Entry:
        entry = self.entries.get((section, name))
        if entry is None:
            known = ", ".join(sorted(one for part, one in self.entries if part == section)) or "none"
            raise self.error(f"{section} has no entry named {name!r}; it has {known}")
        part = entry.part(key)
        return part if part is not None else _Entry(entry.file, entry.where, {})

    def merge(self, path: Path) -> None:
        problems: list[Any] = []
        try:
            documents = list(read_documents(path.read_text(encoding="utf-8"), str(path), problems))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"{path}: cannot be read ({error})") from error
        if problems:
            raise InvalidInputError("\n".join(map(str, problems)), hint="Correct the kubeconfig.")
        if not documents:
            return
        top = _Entry(path, "the file", documents[0].value if isinstance(documents[0].value, Mapping) else {})
        if top.value.get("kind", "Config") != "Config" or len(documents) > 1:
            raise top.error("is no kubeconfig (one document of kind Config)")
        self.current = self.current or top.text("current-context")
        for section in ("clusters", "users", "contexts"):
            items = top.value.get(section)
            if items is None:
                continue
            if not isinstance(items, list):
                raise top.error(f"{section} must be a list")
            for item in items:
                if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
                    raise top.error(f"each entry of {section} must have a name")
                entry = _Entry(path, f"{section}[{item['name']}]", item)
                self.entries.setdefault((section, item["name"]), entry)


def _cluster(cluster: _Entry, user: _Entry | None) -> Cluster:
    server = cluster.text("server")
    if not server:
        raise cluster.error("server is missing")
    is_insecure = cluster.boolean("insecure-skip-tls-verify")
    if is_insecure and (cluster.text("certificate-authority") or cluster.text("certificate-authority-data")):
        raise cluster.error("insecure-skip-tls-verify and a certificate authority exclude each other")
    cluster.inline("certificate-authority-data")  # raises an error now if it is not base64
    return Cluster(
        server,
        authority=lambda: cluster.read("certificate-authority"),
        credentials=_User(user, cluster).credentials if user is not None else lambda _refused: Credentials(),
        proxy=cluster.text("proxy-url") or _proxy_of_environment(server),
        server_name=cluster.text("tls-server-name"),
        is_insecure=is_insecure,
    )


def _proxy_of_environment(server: str) -> str:
    """The proxy that kubectl would use: from HTTPS_PROXY or HTTP_PROXY, "" if NO_PROXY includes the host."""
    parts = urlsplit(server)
    host = parts.hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1" or urllib.request.proxy_bypass(host):
        return ""
    return urllib.request.getproxies().get(parts.scheme, "")


class _User:
    """The credentials of a user entry. Files that the entry names are read for each request."""

    def __init__(self, user: _Entry, cluster: _Entry) -> None:
        self._user = user
        self._plugin: _Plugin | None = None
        if user.value.get("auth-provider") is not None:
            raise user.error("auth-provider is not known any more, by kubectl neither; use an exec plugin")
        for key in ("as", "as-groups", "as-uid", "as-user-extra"):
            if user.value.get(key) is not None:
                raise user.error(f"{key} (impersonation) is not supported")
        part = user.part("exec")
        if part is not None:
            self._plugin = _Plugin(part, cluster)
        self._credentials_of_file()

    def _credentials_of_file(self) -> Credentials:
        user = self._user
        token, path = user.text("token"), user.path("tokenFile")
        headers: Mapping[str, str] = {}
        if path is not None:
            headers = bearer(read_token(path)).headers
        elif token:
            headers = bearer(token).headers
        elif user.text("username"):
            text = f"{user.text('username')}:{user.text('password')}"
            headers = {"Authorization": f"Basic {base64.b64encode(text.encode()).decode('ascii')}"}
        return Credentials(headers, user.read("client-certificate"), user.read("client-key"))

    def credentials(self, refused: Credentials | None) -> Credentials:
        """The current credentials. Raises OSError, InvalidInputError, UnreachableError.

        ``refused``: credentials that the server rejected. If a plugin returned them, it runs again.
        """
        own = self._credentials_of_file()
        if self._plugin is None or own.headers or own.certificate:
            return own
        return self._plugin.credentials(refused)


class _Plugin:
    """An exec plugin: a command that prints an ExecCredential.

    Only one call runs at a time. Its result is cached until it expires or the server rejects it.
    """

    def __init__(self, part: _Entry, cluster: _Entry) -> None:
        self._part = part
        self._cluster = cluster
        self._lock = threading.Lock()
        self._credentials: Credentials | None = None
        self._expires: datetime | None = None
        self._version = part.text("apiVersion")
        if self._version not in EXEC_VERSIONS:
            raise part.error(f"apiVersion must be {' or '.join(EXEC_VERSIONS)}")
        if not part.text("command"):
            raise part.error("command is missing")
        if part.text("interactiveMode") == "Always":
            raise part.error("interactiveMode is Always, and nobody is there to answer")
        arguments = part.value.get("args") or []
        if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
            raise part.error("args must be a list of texts")
        self._arguments: list[str] = arguments
        pairs = part.value.get("env") or []
        if not isinstance(pairs, list) or not all(isinstance(one, Mapping) for one in pairs):
            raise part.error("env must be a list of names with values")
        self._environment = {str(one.get("name")): str(one.get("value", "")) for one in pairs}

    def credentials(self, refused: Credentials | None) -> Credentials:
        """The plugin's credentials: from the cache, unless they expired or equal ``refused``.

        ``refused``: credentials that the server rejected. If several threads call this method, one thread runs the
        plugin for all of them.
        """
        with self._lock:
            is_late = self._expires is not None and datetime.now(timezone.utc) >= self._expires - EXPIRY_MARGIN
            if self._credentials is None or self._credentials is refused or is_late:
                self._credentials, self._expires = self._ask()
            return self._credentials

    def _ask(self) -> tuple[Credentials, datetime | None]:
        command = self._part.text("command")
        if os.sep in command:  # relative to the file, as in kubectl; a bare name is searched in PATH
            command = str(self._part.file.parent / command)
        request: dict[str, Any] = {"interactive": False}
        if self._part.boolean("provideClusterInfo"):
            cluster = self._cluster
            keys = ("server", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
            request["cluster"] = {key: cluster.value[key] for key in keys if cluster.value.get(key)}
            authority = base64.b64encode(cluster.read("certificate-authority")).decode("ascii")
            request["cluster"]["certificate-authority-data"] = authority
        told = json.dumps({"apiVersion": self._version, "kind": "ExecCredential", "spec": request})
        environment = {**os.environ, **self._environment, "KUBERNETES_EXEC_INFO": told}
        try:
            done = subprocess.run(
                [command, *self._arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=EXEC_S,
                check=False,
            )
        except OSError as error:
            hint = self._part.text("installHint") or "Install the plugin, or name it by its path."
            raise UnreachableError(f"the plugin {command} cannot be run ({error.strerror})", hint=hint) from error
        except subprocess.TimeoutExpired as error:
            raise UnreachableError(f"the plugin {command} gave no credentials in {EXEC_S:.0f} s", hint="") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()[-200:]
            raise UnreachableError(f"the plugin {command} failed with exit code {done.returncode}: {text}", hint="")
        return self._answer(command, done.stdout)

    def _answer(self, command: str, output: bytes) -> tuple[Credentials, datetime | None]:
        try:
            return _parse_credential(output, self._version)
        except (ValueError, LookupError, TypeError, AttributeError, InvalidInputError) as error:
            message = f"the plugin {command} gave no {self._version} ExecCredential ({error})"
            raise UnreachableError(message, hint="") from error


def _parse_credential(output: bytes, version: str) -> tuple[Credentials, datetime | None]:
    """Parse an ExecCredential; returns the credentials and when they expire.

    If the output is not an ExecCredential, an exception of any type is raised.
    """
    answer = json.loads(output)
    if answer["kind"] != "ExecCredential" or answer["apiVersion"] != version:
        raise ValueError(f"it is {answer['apiVersion']} {answer['kind']}")
    status = answer["status"]
    token, expires = status.get("token", ""), status.get("expirationTimestamp")
    certificate = status.get("clientCertificateData", "").encode("ascii")
    key = status.get("clientKeyData", "").encode("ascii")
    if not token and not (certificate and key):
        raise ValueError("it has neither a token nor a certificate with its key")
    until = None if expires is None else datetime.fromisoformat(expires.replace("Z", "+00:00"))
    headers = bearer(token).headers if token else {}
    return Credentials(headers, certificate, key), until
