# SPDX-License-Identifier: Apache-2.0
"""`netpolctl cni`: the plugin's entry in the configurations of others, which always stay valid."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.cli.cni import LONGEST_S, TIMEOUT_S, ConfigurationKeeper
from netpol_ebpf.cli.main import main
from netpol_ebpf.cni import installation
from netpol_ebpf.cni.installation import VERSIONS, PluginSettings, install
from netpol_ebpf.errors import InvalidInputError, PlatformError

SOURCE = Path(__file__).parents[2] / "cni" / "netpol_cni.c"
SETTINGS = PluginSettings(Path("/run/netpol-ebpf/agent.sock"), 30, "closed")
OURS = {"type": "netpol-cni", "socket": "/run/netpol-ebpf/agent.sock", "timeout": 30, "posture": "closed"}
BRIDGE = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local", "subnet": "10.1.0.0/24"}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
CHAIN = {"cniVersion": "1.0.0", "name": "pods", "disableCheck": True, "plugins": [BRIDGE, PORTMAP]}
SINGLE = {"cniVersion": "0.3.1", "name": "pods", **BRIDGE, "x": 12345678901234567890}


def program(comment: str, versions: object = VERSIONS) -> bytes:
    """A program that prints the plugin's supported versions."""
    return f"#!/bin/sh\n# {comment}\necho '{json.dumps({'supportedVersions': versions})}'\n".encode()


class Runtime:
    """The directories of a container runtime."""

    def __init__(self, home: Path) -> None:
        self.bin_dir, self.conf_dir = home / "bin", home / "net.d"
        self.conf_dir.mkdir()

    def write(self, name: str, document: Any) -> Path:
        path = self.conf_dir / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    def read(self, name: str) -> Any:
        return json.loads((self.conf_dir / name).read_text())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.conf_dir.iterdir())

    def install(self, settings: PluginSettings = SETTINGS) -> list[str]:
        return [path.name for path in install(self.bin_dir, self.conf_dir, settings)]

    def options(self) -> list[str]:
        return ["--dir", str(self.bin_dir), "--conf-dir", str(self.conf_dir)]

    def remove(self) -> int:
        return main(["cni", "remove", *self.options()])


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime, and a program to install."""
    built = tmp_path / "built"
    built.write_bytes(program("one"))
    built.chmod(0o755)
    monkeypatch.setattr(installation, "PROGRAM", built)
    return Runtime(tmp_path)


def test_a_list_gets_it_at_its_end(runtime: Runtime) -> None:
    """The first configuration by name gets the entry, and everything else in it stays. A second run changes nothing."""
    first = runtime.write("10-pods.conflist", CHAIN)
    first.chmod(0o640)
    runtime.write("20-other.conflist", CHAIN)
    runtime.write("05-readme.txt", "none")
    assert runtime.install() == ["netpol-cni", "10-pods.conflist"]
    assert runtime.read("10-pods.conflist") == {**CHAIN, "plugins": [BRIDGE, PORTMAP, OURS]}
    assert list(runtime.read("10-pods.conflist")) == list(CHAIN)
    assert runtime.read("20-other.conflist") == CHAIN
    assert first.stat().st_mode & 0o777 == 0o640
    written = runtime.bin_dir / "netpol-cni"
    assert (written.read_bytes(), written.stat().st_mode & 0o777) == (program("one"), 0o755)
    assert runtime.install() == []
    assert [path.name for path in runtime.bin_dir.iterdir()] == ["netpol-cni"]
    assert runtime.names() == ["05-readme.txt", "10-pods.conflist", "20-other.conflist"]


@pytest.mark.parametrize("plugins", [[BRIDGE, OURS, PORTMAP], [{**OURS, "posture": "open"}, BRIDGE, PORTMAP, OURS]])
def test_it_is_the_last_one_and_there_once(runtime: Runtime, plugins: list[Any]) -> None:
    """An entry that another program added after ours is corrected, and so is an older setting."""
    runtime.write("10-pods.conflist", {**CHAIN, "plugins": plugins})
    runtime.install()
    assert runtime.read("10-pods.conflist")["plugins"] == [BRIDGE, PORTMAP, OURS]


@pytest.mark.parametrize("suffix", [".conf", ".json"])
def test_a_single_plugin_becomes_a_list(runtime: Runtime, suffix: str) -> None:
    """The list has the same plugin and ours. The original file is kept, and restored when our entry is removed."""
    before = runtime.write(f"10-pods{suffix}", SINGLE)
    before.chmod(0o600)
    text = before.read_text()
    assert runtime.install() == ["netpol-cni", "10-pods.conflist"]
    assert runtime.names() == sorted([f"10-pods{suffix}.netpol-saved", "10-pods.conflist"])
    made = runtime.read("10-pods.conflist")
    assert (made["cniVersion"], made["name"]) == ("0.3.1", "pods")
    assert made["plugins"] == [{**BRIDGE, "x": 12345678901234567890}, OURS]
    assert (runtime.conf_dir / "10-pods.conflist").stat().st_mode & 0o777 == 0o600
    assert runtime.install() == []
    assert runtime.remove() == 0
    assert runtime.names() == [f"10-pods{suffix}"]
    assert before.read_text() == text


def test_removal_leaves_what_was_there(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """Our entry is removed from every list, and so is the program. A second run has nothing to do."""
    for name in ("10-pods.conflist", "20-other.conflist"):
        runtime.write(name, {**CHAIN, "plugins": [BRIDGE, OURS, PORTMAP]})
    runtime.write("30-foreign.conflist", "{ netpol")
    runtime.install()
    assert runtime.remove() == 0
    assert [runtime.read(name) for name in ("10-pods.conflist", "20-other.conflist")] == [CHAIN, CHAIN]
    assert list(runtime.bin_dir.iterdir()) == []
    capsys.readouterr()
    assert runtime.remove() == 0
    assert capsys.readouterr().out == "nothing to remove\n"


@pytest.mark.parametrize(
    "text", ['{"plugins": [{"type": "netpol-cni"}], "name"', json.dumps({**CHAIN, "plugins": [OURS]})]
)
def test_what_cannot_be_removed_is_told(runtime: Runtime, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A file that cannot be parsed, or would be left without a plugin, stays, and the exit code shows it.

    All else is removed.
    """
    runtime.write("10-pods.conflist", text)
    runtime.bin_dir.mkdir()
    (runtime.bin_dir / "netpol-cni").touch()
    assert runtime.remove() == 5
    assert "10-pods.conflist" in capsys.readouterr().err
    assert (runtime.conf_dir / "10-pods.conflist").read_text() == text
    assert list(runtime.bin_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no network configuration"),
        ({"10-pods.conflist.bak": CHAIN}, "has no network configuration"),
        ({"10-pods.conflist": "{"}, "is no network configuration"),
        ({"10-pods.conflist": "[]"}, "is no network configuration"),
        ({"10-pods.conflist": {**CHAIN, "plugins": {}}}, "is no list of plugins"),
        ({"10-pods.conflist": {**CHAIN, "plugins": ["bridge"]}}, "is no list of plugins"),
        ({"10-pods.conflist": {**CHAIN, "plugins": []}}, "no other plugin"),
        ({"10-pods.conflist": {**CHAIN, "plugins": [OURS]}}, "no other plugin"),
        ({"10-pods.conflist": {**CHAIN, "cniVersion": "2.0.0"}}, "its cniVersion is '2.0.0'"),
        ({"10-pods.conf": {**SINGLE, "cniVersion": "0.2.0"}}, "its cniVersion is '0.2.0'"),
        ({"10-pods.conf": BRIDGE}, "its cniVersion is None"),
        ({"10-pods.conf": CHAIN}, "has no type"),
        ({"10-pods.conf": SINGLE, "10-pods.conflist": CHAIN}, "is another one's"),
    ],
)
def test_what_it_cannot_be_put_into(runtime: Runtime, files: dict[str, Any], message: str) -> None:
    """A file of others that cannot be parsed stays unchanged, and the message names it."""
    for name, document in files.items():
        runtime.write(name, document)
    before = {path.name: path.read_bytes() for path in runtime.conf_dir.iterdir()}
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        runtime.install()
    assert {path.name: path.read_bytes() for path in runtime.conf_dir.iterdir()} == before


def test_a_conversion_that_was_cut_short(runtime: Runtime) -> None:
    """An agent that ended between the two steps leaves both files. The next one continues."""
    runtime.write("10-pods.conf", SINGLE)
    runtime.install()
    (runtime.conf_dir / "10-pods.conf.netpol-saved").rename(runtime.conf_dir / "10-pods.conf")
    assert runtime.install() == ["10-pods.conflist"]
    assert runtime.names() == ["10-pods.conf.netpol-saved", "10-pods.conflist"]


def test_a_new_version_of_the_program(runtime: Runtime) -> None:
    """The program is replaced by a new file, because a running program cannot be written to."""
    runtime.write("10-pods.conflist", CHAIN)
    runtime.install()
    before = (runtime.bin_dir / "netpol-cni").stat().st_ino
    installation.PROGRAM.write_bytes(program("two"))
    with (runtime.bin_dir / "netpol-cni").open("rb") as running:
        assert runtime.install() == ["netpol-cni"]
        assert running.read() == program("one")
    assert (runtime.bin_dir / "netpol-cni").stat().st_ino != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be run"),
        (b"\x7fELF of another machine", "cannot be run"),
        (program("", ["0.1.0"]), "not the CNI plugin of this version"),
        (b"#!/bin/sh\nexit 1\n", "not the CNI plugin"),
        (b"#!/bin/sh\necho []\n", "is not the CNI plugin"),
        (b"#!/bin/sh\n", "is not the CNI plugin"),
    ],
)
def test_no_program(runtime: Runtime, content: bytes | None, message: str) -> None:
    """Without a program that runs here, nothing is written that names it, because every pod's start would fail."""
    runtime.write("10-pods.conflist", CHAIN)
    if content is None:
        installation.PROGRAM.unlink()
    else:
        installation.PROGRAM.write_bytes(content)
    with pytest.raises(PlatformError, match=message):
        runtime.install()
    assert runtime.read("10-pods.conflist") == CHAIN
    assert not runtime.bin_dir.exists()


def test_it_follows_others(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """The installer waits for a configuration, and adds the plugin again when another program has rewritten the file.

    A fault is reported once.
    """

    def put() -> list[Path]:
        return install(runtime.bin_dir, runtime.conf_dir, SETTINGS)

    follower = ConfigurationKeeper(runtime.bin_dir, runtime.conf_dir, put)
    assert follower.look() == follower.look() == []
    assert caplog.text.count("has no network configuration") == 1
    path = runtime.write("10-pods.conflist", CHAIN)
    assert follower.look() == [path]
    assert follower.look() == follower.look() == []
    for _ in range(2):
        path.unlink()
        runtime.write("10-pods.conflist", CHAIN)
        assert follower.look() == [path]
    (runtime.bin_dir / "netpol-cni").unlink()
    assert follower.look() == [runtime.bin_dir / "netpol-cni"]
    assert follower.look() == []
    runtime.write("10-pods.conflist", "{")
    assert follower.look() == follower.look() == []
    assert caplog.text.count("is no network configuration") == 1
    new = runtime.write("00-new.conf", SINGLE)
    assert follower.look() == [new.with_suffix(".conflist")]


def test_it_looks_only_when_something_changed(runtime: Runtime) -> None:
    """While no file changes, none is read."""
    calls: list[int] = []

    def put() -> list[Path]:
        calls.append(1)
        return []

    follower = ConfigurationKeeper(runtime.bin_dir, runtime.conf_dir, put)
    runtime.write("10-pods.conflist", CHAIN)
    for _ in range(3):
        follower.look()
    assert len(calls) == 1


def test_commands(runtime: Runtime, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The options are in the configuration. The actions are printed, also as JSON."""
    runtime.write("10-pods.conflist", CHAIN)
    install_it = [
        "cni",
        "install",
        *runtime.options(),
        "--state-dir",
        str(tmp_path),
        "--timeout",
        "7",
        "--posture",
        "open",
    ]
    assert main([*install_it, "-o", "json"]) == 0
    written = [str(runtime.bin_dir / "netpol-cni"), str(runtime.conf_dir / "10-pods.conflist")]
    assert json.loads(capsys.readouterr().out) == {"written": written}
    ours = {"type": "netpol-cni", "socket": str(tmp_path / "agent.sock"), "timeout": 7, "posture": "open"}
    assert runtime.read("10-pods.conflist")["plugins"][-1] == ours
    assert main(install_it) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*install_it, "--timeout", "0"]) == 2
    assert main([*install_it, "--state-dir", "/" + "x" * 120]) == 2
    (runtime.conf_dir / "10-pods.conflist").unlink()
    assert main(install_it) == 3


def test_the_plugin_knows_the_same(runtime: Runtime) -> None:
    """Versions and limits are those of the C source."""
    del runtime
    text = SOURCE.read_text()
    newest = re.findall(r'#define NEWEST "([^"]+)"', text)
    (known,) = re.findall(r"VERSIONS\[\] = \{(.*?)\}", text)
    assert [*re.findall(r'"([^"]+)"', known), *newest] == list(VERSIONS)
    bounds = {name: int(re.findall(rf"\b{name} = (\d+)", text)[0]) for name in ("TIMEOUT_S", "LONGEST_S")}
    assert bounds == {"TIMEOUT_S": TIMEOUT_S, "LONGEST_S": LONGEST_S}


def test_cleanup_takes_it_away(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`netpolctl cleanup` removes the plugin first, because no pod may wait for an agent that does not come back."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    runtime.write("10-pods.conflist", CHAIN)
    runtime.install()
    options = [
        "--pin-root", str(tmp_path / "pins"), "--state-dir", str(tmp_path / "state"),
        "--cni-dir", str(runtime.bin_dir), "--cni-conf-dir", str(runtime.conf_dir),
    ]  # fmt: skip
    assert main(["cleanup", "--dry-run", *options]) == 0
    assert capsys.readouterr().out.startswith("would remove CNI configuration")
    assert runtime.read("10-pods.conflist") != CHAIN
    assert main(["cleanup", *options]) == 0
    assert runtime.read("10-pods.conflist") == CHAIN
    assert list(runtime.bin_dir.iterdir()) == []
