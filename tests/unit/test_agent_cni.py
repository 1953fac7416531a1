# SPDX-License-Identifier: Apache-2.0
"""Results that network plugins left on the node: each is read once, and trusted only if only root can write it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.agent.cni import CniResult, CniResultCache, parse_result
from netpol_ebpf.policy.types import EndpointKey

WEB = EndpointKey("Pod", "shop", "web")


def cached(plugin: str = "bridge", inside: str = "eth0", arguments: Any = None, interfaces: Any = None) -> str:
    """A file as libcni writes it."""
    return json.dumps({
        "kind": "cniCacheV1",
        "containerId": "c0ffee",
        "config": base64.b64encode(json.dumps({"plugins": [{"type": plugin}, {"type": "portmap"}]}).encode()).decode(),
        "ifName": inside,
        "networkName": "net",
        "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"]] if arguments is None else arguments,
        "result": {
            "interfaces": interfaces
            or [{"name": "cni0"}, {"name": "veth1"}, {"name": inside, "sandbox": "/var/run/netns/x"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 2}, {"address": "fd00::1/64", "interface": 2}],
        },
    })  # fmt: skip


def encoded(plugin: str = "bridge", inside: str = "eth0", arguments: Any = None) -> bytes:
    return cached(plugin, inside, arguments).encode()


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / "results"
    found.mkdir(mode=0o700)
    return found


def test_result_names_pod_and_interface() -> None:
    """The pod comes from the runtime's arguments, with the interfaces on the node, and the type of the first plugin."""
    addresses = frozenset({ip_address("10.0.0.1"), ip_address("fd00::1")})
    assert parse_result(encoded()) == CniResult(WEB, frozenset({"cni0", "veth1"}), addresses, "eth0", "bridge")
    assert not CniResult(WEB, frozenset(), frozenset(), "eth0", "bridge").is_unseen
    found = parse_result(encoded("macvlan", "net1"))
    assert found is not None
    assert found.is_unseen


def test_what_is_no_pod_s_counts_for_nothing() -> None:
    """Containers without a Kubernetes pod are ignored."""
    assert parse_result(encoded(arguments=[])) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only what root owns is trusted")
def test_directory_is_followed(directory: Path) -> None:
    """Files are added, changed and removed. An unchanged file is not read again."""
    results = CniResultCache(directory)
    assert results.look() == []
    write(directory / "net-c0ffee-eth0", cached())
    assert [one.inside for one in results.look()] == ["eth0"]
    write(directory / "net-c0ffee-eth0", cached(inside="eth00"))
    assert [one.inside for one in results.look()] == ["eth00"]
    (directory / "net-c0ffee-eth0").unlink()
    assert results.look() == []
    assert results.problems == ()


BAD = {
    "empty": "", "cut short": "{", "list": "[]", "null": "null", "number for arguments": '{"cniArgs": 5}', "too deep": "[" * 100_000,
    "half an argument": '{"cniArgs": [["K8S_POD_NAME"]]}', "lists for an argument": '{"cniArgs": [[[], []]]}',
    "list for a name": cached(interfaces=[{"name": ["a"]}]), "no name": cached(interfaces=[{}]), "number": cached(interfaces=[5]),
    "object for a list": cached(interfaces={"name": "a"}), "number for a sandbox": cached(interfaces=[{"name": "a", "sandbox": 5}]),
    "half a character": cached(arguments=[["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "\udfff"]]),
    "number for an address": cached().replace('"10.0.0.1/24"', "5"), "list for a text": cached().replace('"ifName": "eth0"', '"ifName": [1]'),
}  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only what root owns is trusted")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_file_that_cannot_be_read_is_told(directory: Path, bad: str) -> None:
    """All other files count."""
    write(directory / "good", cached())
    write(directory / "bad", bad)
    results = CniResultCache(directory)
    assert [one.pod for one in results.look()] == [WEB]
    assert [one.slug for one in results.problems] == ["cni-results"]
    write(directory / "bad", cached(inside="net1"))
    assert len(results.look()) == 2
    assert results.problems == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only what root owns is trusted")
def test_what_others_can_write_counts_for_nothing(directory: Path) -> None:
    """A file, a directory or a link that others can write is not used."""
    write(directory / "open", cached())
    (directory / "open").chmod(0o666)
    write(directory.parent / "elsewhere", cached())
    (directory / "link").symlink_to(directory.parent / "elsewhere")
    results = CniResultCache(directory)
    assert results.look() == []
    assert len(results.problems) == 2
    directory.chmod(0o777)
    write(directory / "good", cached())
    assert results.look() == []
    assert "users other than root may write it" in results.problems[0].message


@pytest.mark.skipif(os.geteuid() != 0, reason="only what root owns is trusted")
def test_what_is_no_file_keeps_nobody_waiting(directory: Path) -> None:
    """A FIFO without a writer, a socket and a huge file are reported, and all others count."""
    write(directory / "good", cached())
    os.mkfifo(directory / "fifo", 0o600)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(directory / "socket"))
    (directory / "socket").chmod(0o600)
    with (directory / "sparse").open("wb") as file:
        file.truncate(100 << 30)
    (directory / "sparse").chmod(0o600)
    results = CniResultCache(directory)
    assert [one.pod for one in results.look()] == [WEB]
    assert sorted(Path(one.location.file).name for one in results.problems) == ["fifo", "socket", "sparse"]


def test_no_directory_is_no_problem(tmp_path: Path) -> None:
    """Most nodes without such a runtime have no directory."""
    results = CniResultCache(tmp_path / "none")
    assert (results.look(), results.problems) == ([], ())
