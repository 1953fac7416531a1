# SPDX-License-Identifier: Apache-2.0
"""kubeconfig files as kubectl reads them: contexts, merging, credentials of each sort, plugins."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from apiserver_traces import Reply
from fake_apiserver import FakeServer, Wire

from netpol_ebpf.errors import InvalidInputError, UnreachableError
from netpol_ebpf.sources.kubernetes.client import Client
from netpol_ebpf.sources.kubernetes.kubeconfig import find_cluster, load_kubeconfig

V1 = "client.authentication.k8s.io/v1"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def write(path: Path, *, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None, **top: Any) -> Path:
    """A kubeconfig with one context, ``c``."""
    whole = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "k", "cluster": {"server": "https://k.test:6443", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "current-context": "c",
    } | top
    path.write_text(json.dumps(whole))
    return path


def header(path: Path) -> str:
    """Of the credentials of the current context."""
    return load_kubeconfig([path]).credentials(None).headers.get("Authorization", "")


def test_yaml_is_read(tmp_path: Path) -> None:
    """As kubectl writes it; what is not used is not judged."""
    path = tmp_path / "config"
    path.write_text("""\
apiVersion: v1
kind: Config
preferences: {}
clusters:
- name: k
  cluster: {server: "https://k.test:6443", tls-server-name: other.test, proxy-url: "http://p:3128"}
users:
- name: u
  user: {token: secret}
contexts:
- name: c
  context: {cluster: k, user: u, namespace: prod}
current-context: c
""")
    cluster = load_kubeconfig([path])
    assert (cluster.server, cluster.server_name, cluster.proxy) == (
        "https://k.test:6443",
        "other.test",
        "http://p:3128",
    )
    assert cluster.credentials(None).headers == {"Authorization": "Bearer secret"}


def test_files_are_merged(tmp_path: Path) -> None:
    """The first of a name counts, and the first current context; a file that is not there is passed over."""
    first = write(tmp_path / "one", user={"token": "one"})
    second = write(
        tmp_path / "two",
        user={"token": "two"},
        contexts=[{"name": "d", "context": {"cluster": "k", "user": "u"}}],
        **{"current-context": "d"},
    )
    joined = os.pathsep.join(map(str, (tmp_path / "none", first, second)))
    for context in ("", "c", "d"):
        cluster = find_cluster(context=context, environment={"KUBECONFIG": joined})
        assert cluster.credentials(None).headers == {"Authorization": "Bearer one"}
    assert header(second) == "Bearer two"


def test_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    """And what they name is read each time."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "ca.crt").write_bytes(b"ca")
    (tmp_path / "deep" / "token").write_text("one")
    path = write(tmp_path / "deep" / "config", user={"tokenFile": "token"}, cluster={"certificate-authority": "ca.crt"})
    cluster = load_kubeconfig([path])
    assert cluster.authority() == b"ca"
    assert header(path) == "Bearer one"
    (tmp_path / "deep" / "token").write_text("two")
    assert cluster.credentials(None).headers == {"Authorization": "Bearer two"}
    (tmp_path / "deep" / "ca.crt").write_bytes(b"new")
    assert cluster.authority() == b"new"


def test_data_in_the_file_counts(tmp_path: Path) -> None:
    """Over the file that is named beside it."""
    pair = {f"client-{name}-data": base64.b64encode(name.encode()).decode() for name in ("certificate", "key")}
    user = {**pair, "client-certificate": "/none", "client-key": "/none"}
    path = write(
        tmp_path / "config", user=user, cluster={"certificate-authority-data": base64.b64encode(b"ca").decode()}
    )
    cluster = load_kubeconfig([path])
    credentials = cluster.credentials(None)
    assert (credentials.certificate, credentials.key, cluster.authority()) == (b"certificate", b"key", b"ca")


def test_name_and_password(tmp_path: Path) -> None:
    """Basic authentication, for a proxy before the server."""
    assert header(write(tmp_path / "config", user={"username": "u", "password": "p"})) == "Basic dTpw"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"current-context": ""}, "no context is current"),
        ({"current-context": "x"}, "no entry named 'x'; it has c"),
        ({"contexts": [{"name": "c", "context": {"cluster": "x", "user": "u"}}]}, "clusters has no entry named 'x'"),
        ({"contexts": [{"name": "c", "context": {"cluster": "k", "user": "x"}}]}, "users has no entry named 'x'"),
        ({"contexts": {}}, "contexts must be a list"),
        ({"contexts": [{}]}, "must have a name"),
        ({"contexts": [{"name": "c", "context": []}]}, "must be a mapping"),
        ({"kind": "Pod"}, "is no kubeconfig"),
        ({"clusters": [{"name": "k", "cluster": {}}]}, "server is missing"),
        ({"cluster": {"server": 1}}, "server must be text"),
        ({"cluster": {"insecure-skip-tls-verify": "yes"}}, "must be true or false"),
        ({"cluster": {"insecure-skip-tls-verify": True, "certificate-authority": "x"}}, "exclude each other"),
        ({"cluster": {"certificate-authority-data": "!"}}, "is not base64"),
        ({"user": {"token": 5}}, "token must be text"),
        ({"user": {"client-key-data": "!"}}, "is not base64"),
        ({"user": {"auth-provider": {"name": "gcp"}}}, "auth-provider"),
        ({"user": {"as": "admin"}}, "impersonation"),
        ({"user": {"exec": {"command": "x"}}}, "apiVersion must be"),
        ({"user": {"exec": {"apiVersion": V1}}}, "command is missing"),
        ({"user": {"exec": {"apiVersion": V1, "command": "x", "args": [1]}}}, "args must be"),
        ({"user": {"exec": {"apiVersion": V1, "command": "x", "env": ["a"]}}}, "env must be"),
        ({"user": {"exec": {"apiVersion": V1, "command": "x", "interactiveMode": "Always"}}}, "nobody is there"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """With the file's name."""
    path = write(tmp_path / "config", **changes)
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_kubeconfig([path])
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["a: [", "", "[]", "---\na: 1\n---\nb: 2\n"])
def test_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """YAML that does not parse, nothing, a list, several documents."""
    (tmp_path / "config").write_text(text)
    with pytest.raises(InvalidInputError):
        load_kubeconfig([tmp_path / "config"])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """By its name; and without any file, the pod's cluster is looked for."""
    with pytest.raises(InvalidInputError, match="there is no such file"):
        load_kubeconfig([tmp_path / "none"])


def test_proxy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kubectl; the file's own counts more."""
    path = write(tmp_path / "config")
    monkeypatch.setenv("HTTPS_PROXY", "http://p:3128")
    assert load_kubeconfig([path]).proxy == "http://p:3128"
    monkeypatch.setenv("NO_PROXY", ".test")
    assert load_kubeconfig([path]).proxy == ""
    monkeypatch.delenv("NO_PROXY")
    assert load_kubeconfig([write(tmp_path / "local", cluster={"server": "https://127.0.0.1:1"})]).proxy == ""
    assert load_kubeconfig([write(tmp_path / "own", cluster={"proxy-url": "http://own:1"})]).proxy == "http://own:1"


# --- plugins ----------------------------------------------------------------------------------------------------------------------


def plugin(directory: Path, script: str, **changes: Any) -> Path:
    """A kubeconfig whose user is a plugin that runs a script; the script has `count`, how often it ran before, and `info`."""
    file = directory / "plugin"
    file.write_text(f"""#!{sys.executable}
import json, os, sys
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
def answer(**status):
    print(json.dumps({{"apiVersion": "{V1}", "kind": "ExecCredential", "status": status}}))
counter = os.path.join({str(directory)!r}, "count")
count = os.path.getsize(counter) if os.path.exists(counter) else 0
open(counter, "a").write("x")
{script}
""")
    file.chmod(0o755)
    return write(directory / "config", user={"exec": {"apiVersion": V1, "command": "./plugin", **changes}})


def test_plugin_gives_a_token(tmp_path: Path) -> None:
    """With its arguments, its environment and, if it asks for it, the cluster."""
    script = "answer(token='-'.join([sys.argv[1], os.environ['MORE'], info['spec']['cluster']['server']]))"
    path = plugin(tmp_path, script, args=["a"], env=[{"name": "MORE", "value": "m"}], provideClusterInfo=True)
    assert header(path) == "Bearer a-m-https://k.test:6443"


def test_plugin_gives_a_certificate(tmp_path: Path) -> None:
    """In place of a token."""
    path = plugin(tmp_path, "answer(clientCertificateData='C', clientKeyData='K')")
    credentials = load_kubeconfig([path]).credentials(None)
    assert (credentials.headers, credentials.certificate, credentials.key) == ({}, b"C", b"K")


def test_answer_of_a_plugin_is_kept_until_it_expires_or_is_refused(tmp_path: Path) -> None:
    """Not a process for each request."""
    path = plugin(tmp_path, "answer(token=f't{count}')")
    cluster = load_kubeconfig([path])
    first = cluster.credentials(None)
    assert cluster.credentials(None) is first
    second = cluster.credentials(first)
    assert cluster.credentials(first) is second  # of another request that was refused as well
    headers = [one.headers["Authorization"] for one in (first, second)]
    assert headers == ["Bearer t0", "Bearer t1"]


def test_expired_answer_of_a_plugin_is_renewed(tmp_path: Path) -> None:
    """By its own time."""
    script = (
        "answer(token=f't{count}', expirationTimestamp='2020-01-01T00:00:00Z' if count < 2 else '2999-01-01T00:00:00Z')"
    )
    cluster = load_kubeconfig([plugin(tmp_path, script)])
    tokens = [cluster.credentials(None).headers["Authorization"] for _ in range(4)]
    assert tokens == ["Bearer t0", "Bearer t1", "Bearer t2", "Bearer t2"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.stderr.write('log in first'); sys.exit(3)", "exit code 3: log in first"),
        ("print('hello')", "gave no"),
        ("answer()", "neither a token nor"),
        ("answer(clientCertificateData='C')", "neither a token nor"),
        ("answer(token='a\\nb')", "gave no"),
        ("answer(token='a', expirationTimestamp='soon')", "gave no"),
        ("print(json.dumps({'kind': 'Pod', 'apiVersion': 'v1', 'status': {}}))", "v1 Pod"),
    ],
)
def test_plugin_that_fails_makes_the_server_unreachable(tmp_path: Path, script: str, message: str) -> None:
    """It may be better the next time; no request goes out without credentials."""
    with FakeServer(lambda _request: Wire(Reply())) as server:
        path = plugin(tmp_path, script)
        cluster = load_kubeconfig([path])
        with pytest.raises(UnreachableError, match=message):
            Client(cluster).get("/x", head_s=1, idle_s=1)
        assert server.requests == []


def test_missing_plugin_gives_its_hint(tmp_path: Path) -> None:
    """The one of the file."""
    path = write(
        tmp_path / "config", user={"exec": {"apiVersion": V1, "command": "./none", "installHint": "install it"}}
    )
    with pytest.raises(UnreachableError, match="cannot be run") as caught:
        header(path)
    assert caught.value.hint == "install it"
