# SPDX-License-Identifier: Apache-2.0
"""The configuration file and the environment: values, precedence, errors, and who may write the file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.agent import configuration
from netpol_ebpf.agent import main as agent_main
from netpol_ebpf.agent.configuration import (
    CONFIG_VARIABLE,
    PREFIX,
    SERVICE_VARIABLE,
    load_trusted,
    parse_arguments,
    settings_of,
)
from netpol_ebpf.agent.main import build_parser
from netpol_ebpf.agent.source_options import DEFAULT_MANIFESTS
from netpol_ebpf.cli.main import main
from netpol_ebpf.errors import InvalidInputError, UsageError, ValidationError

ROOT = Path(__file__).parents[2]
HEAD = "apiVersion: netpol-ebpf/v1alpha1\nkind: NodeConfiguration\n"
REFUSED = "can be written by its group or by everybody"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(HEAD + text)
    return path


def parsed(*argv: str, **environment: str) -> argparse.Namespace:
    return parse_arguments(build_parser(), argv, {CONFIG_VARIABLE: "none", **environment})


# --- layers ---------------------------------------------------------------------------------------------------------------


def test_each_source_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    """The order is command line, environment, file, default. A list replaces a list."""
    file = str(written(tmp_path, "node: of-file\ntunnel: [ipip]\nbarrier: 'off'\nstateDir: /file\n"))
    variables = {
        "NETPOL_EBPF_NODE": "of-environment",
        "NETPOL_EBPF_TUNNEL": "gre, udp:8472",
        "NETPOL_EBPF_STATE_DIR": "/env",
    }
    only_file = parsed("--config", file)
    assert (only_file.node, only_file.tunnel, only_file.barrier) == ("of-file", ["ipip"], "off")
    both = parsed("--config", file, **variables)
    assert (both.node, both.tunnel, both.barrier) == ("of-environment", ["gre", "udp:8472"], "off")
    assert both.state_dir == Path("/env")
    all_three = parsed("--config", file, "--node", "given", "--tunnel", "ip6", "--tunnel", "ipip", **variables)
    assert (all_three.node, all_three.tunnel) == ("given", ["ip6", "ipip"])
    assert all_three.origins == {
        "--barrier": f"barrier in {file}:5",
        "--state-dir": "the environment variable NETPOL_EBPF_STATE_DIR",
    }
    none = parsed()
    assert (none.node, none.tunnel, none.barrier, none.state_dir) == (None, [], "nft", agent_main.DEFAULT_STATE_DIR)


def test_every_option_is_in_the_file_and_in_the_environment(tmp_path: Path) -> None:
    """For each option, a value by either way equals the value by the command line. No option needs code of its own."""
    settings = settings_of(build_parser())
    assert len(settings) > 20
    for dest, one in settings.items():
        assert re.fullmatch(r"[a-z][A-Za-z]*", one.key), one.key
        text = str(one.action.choices[-1]) if one.action.choices else "7"
        value: Any = True if one.is_switch else [text] if one.is_list else text
        if one.action.type in (int, float):
            value = int(text)
        typed = [one.flag] if one.is_switch else [one.flag, text]
        expected = getattr(parsed(*typed), dest)
        assert expected == getattr(parsed(**{one.variable: "true" if one.is_switch else text}), dest), one.flag
        file = written(tmp_path, yaml.safe_dump({one.key: value}))
        assert expected == getattr(parsed("--config", str(file)), dest), one.flag
        assert expected != one.default, one.flag


def test_an_option_that_is_added_needs_no_further_work(tmp_path: Path) -> None:
    """A number, a switch, a list, a choice and a type of its own, as a new option may have them."""

    def parse_port(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text} is no port")
        return int(text)

    def make() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        configuration.add_config_option(parser)
        parser.add_argument("--health-port", type=parse_port, default=None)
        parser.add_argument("--status-period", type=float, default=60.0)
        parser.add_argument("--workers", type=int, default=2)
        parser.add_argument("--tell", choices=("some", "all"), default="some")
        parser.add_argument("--quiet", action=argparse.BooleanOptionalAction, default=True)
        return parser

    def read(text: str) -> argparse.Namespace:
        return parse_arguments(make(), ["--config", str(written(tmp_path, text))], {})

    given = read("healthPort: '80'\nstatusPeriod: 1.5\nworkers: 3\ntell: all\nquiet: false\n")
    assert (given.health_port, given.status_period, given.workers, given.tell, given.quiet) == (
        80,
        1.5,
        3,
        "all",
        False,
    )
    assert parse_arguments(make(), ["--quiet"], {CONFIG_VARIABLE: "none", "NETPOL_EBPF_QUIET": "false"}).quiet is True
    for text, said in (
        ("healthPort: eighty", "eighty is no port"),
        ("workers: 1.5", "is not a whole number"),
        ("workers: two", "must be a number"),
        ("tell: any", "must be one of some, all"),
    ):
        with pytest.raises(ValidationError, match=rf"config.yaml:3: .*{said}"):
            read(text)


def test_both_ways_to_an_api_exclude_each_other_in_one_source_only(tmp_path: Path) -> None:
    """Between two sources the one with precedence counts: a file for all nodes, and a command line that differs."""
    file = str(written(tmp_path, "kubeconfig: /k\n"))
    given = parsed("--config", file, "--kubernetes")
    assert (given.kubernetes, given.kubeconfig) == (True, None)
    given = parsed("--config", file, NETPOL_EBPF_KUBERNETES="false")
    assert (given.kubernetes, given.kubeconfig) == (False, Path("/k"))
    both = str(written(tmp_path, "kubeconfig: /k\nkubernetes: true\n"))
    with pytest.raises(UsageError, match=r"config.yaml:4\) and --kubeconfig .*config.yaml:3\) exclude each other"):
        parsed("--config", both)


def test_an_empty_variable_and_a_null_are_no_value(tmp_path: Path) -> None:
    """Templates write both if a value is missing."""
    file = str(written(tmp_path, "node: of-file\nstateDir: null\n"))
    given = parsed("--config", file, NETPOL_EBPF_NODE="")
    assert (given.node, given.state_dir) == ("of-file", agent_main.DEFAULT_STATE_DIR)


def test_the_file_is_named_by_option_by_variable_or_by_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order. Only the default file may be absent."""
    one, other, default = tmp_path / "one", tmp_path / "other", tmp_path / "default"
    for path in (one, other, default):
        path.write_text(f"{HEAD}node: {path.name}\n")
    monkeypatch.setattr(configuration, "DEFAULT_FILE", default)

    def node(*argv: str, **environment: str) -> str | None:
        found: str | None = parse_arguments(build_parser(), argv, environment).node
        return found

    assert node("--config", str(one), **{CONFIG_VARIABLE: str(other)}) == "one"
    assert node(**{CONFIG_VARIABLE: str(other)}) == "other"
    assert node() == node(**{CONFIG_VARIABLE: ""}) == "default"
    assert node("--config", "none") is None
    default.unlink()
    assert node() is None
    with pytest.raises(InvalidInputError, match="does not exist"):
        node("--config", str(default))


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodee: a", r":3: error: nodee: unknown field `nodee` \(did you mean `node`\?\)"),
        ("state-dir: /a", r":3: .*unknown field `state-dir` \(did you mean `stateDir`\?\)"),
        ("once: true", ":3: .*unknown field `once`"),
        ("node: 5", ":3: .*must be text"),
        ("hairpin: 'yes'", ":3: .*must be true or false"),
        ("tunnel: ipip", ":3: .*must be a list"),
        ("tunnel: [ipip,\n  5]", ":4: .*must be text"),
        ("barrier: iptables", ":3: .*must be one of nft, off"),
        ("node: a\nnode: b", ":4: .*"),
        ("node: [", ":3: .*not valid YAML|:4: .*not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    """Unknown keys (with the nearest known key), wrong types, duplicates, and text that is not YAML."""
    with pytest.raises(ValidationError, match=said):
        parsed("--config", str(written(tmp_path, text + "\n")))


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    """There is one line for each problem."""
    with pytest.raises(ValidationError) as caught:
        parsed("--config", str(written(tmp_path, "nodee: a\nhairpin: 1\n")))
    assert sorted(one.location.line for one in caught.value.problems) == [3, 4]


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", HEAD + "---\n" + HEAD, "- a\n", HEAD.replace("v1alpha1", "v2"), "kind: NodeConfiguration\n"],
)
def test_a_file_is_one_object_of_this_kind(tmp_path: Path, text: str) -> None:
    """An empty file is a truncated one, and does not stand for the defaults."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InvalidInputError):
        parsed("--config", str(tmp_path / "config.yaml"))


def test_an_unknown_variable_is_refused() -> None:
    """The error has the nearest known variable.

    Those that a kubelet sets for a Service with such a name are ignored.
    """
    with pytest.raises(UsageError, match=r"NETPOL_EBPF_NOD is no option \(did you mean `NETPOL_EBPF_NODE`\?\)"):
        parsed(NETPOL_EBPF_NOD="a")
    for unrelated in ("NETPOL_EBPF_COLOUR", "NETPOL_EBPF_LEVEL", "NETPOL_EBPF_X"):
        with pytest.raises(UsageError, match=f"{unrelated} is no option$"):
            parsed(**{unrelated: "a"})
    with pytest.raises(UsageError, match="NETPOL_EBPF_HAIRPIN: must be one of true, false"):
        parsed(NETPOL_EBPF_HAIRPIN="yes")
    parsed(
        NETPOL_EBPF_SERVICE_HOST="10.0.0.1", NETPOL_EBPF_SERVICE_PORT_HTTP="80", NETPOL_EBPF_PORT="tcp://10.0.0.1:80",
        NETPOL_EBPF_PORT_80_TCP_ADDR="10.0.0.1", NETPOL_EBPF_PORT_80_TCP="tcp://10.0.0.1:80",
        NETPOL_EBPF_METRICS_SERVICE_HOST="10.0.0.1", NETPOL_EBPF_METRICS_SERVICE_PORT="80",
        NETPOL_EBPF_MY_APP_2_SERVICE_PORT_HTTP="80", NETPOL_EBPF_METRICS_PORT="tcp://10.0.0.1:80",
        NETPOL_EBPF_METRICS_PORT_80_TCP_PROTO="tcp", NETPOL_EBPF_BARRIER_PORT_53_UDP="udp://10.0.0.1:53",
    )  # fmt: skip


def test_no_option_has_the_variable_of_a_service() -> None:
    """No option's variable has the ending of those that a kubelet sets, so a Service never sets an option."""
    variables = [one.variable for one in settings_of(build_parser()).values()]
    assert not [one for one in variables if SERVICE_VARIABLE.fullmatch(one.removeprefix(PREFIX))]


def test_an_error_says_where_the_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the option, and the line or variable that set it. A broken file is one error, and not a bug."""
    file = written(tmp_path, f"manifests: {tmp_path}\ntunnel: [vxlan]\n")
    assert agent_main.main(["--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "error: --tunnel vxlan: expected" in said
    assert f"hint: --tunnel is set by tunnel in {file}:4." in said
    monkeypatch.setenv("NETPOL_EBPF_TUNNEL", "gre:1")
    assert agent_main.main(["--config", str(file)]) == 2
    assert "--tunnel is set by the environment variable NETPOL_EBPF_TUNNEL." in capsys.readouterr().err
    assert agent_main.main(["--config", str(tmp_path / "gone")]) == 3
    assert f"the configuration file {tmp_path / 'gone'} does not exist" in capsys.readouterr().err


# --- netpolctl ----------------------------------------------------------------------------------------------------------


def test_netpolctl_takes_the_agent_s_options_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file gives the state directory, unless the command line or a variable names another one."""
    file = written(tmp_path, f"stateDir: {tmp_path}/of-file\n")
    assert main(["status", "--config", str(file)]) == 4
    assert f"{tmp_path}/of-file/" in capsys.readouterr().err
    assert main(["status", "--config", str(file), "--state-dir", f"{tmp_path}/given"]) == 4
    assert f"{tmp_path}/given/" in capsys.readouterr().err
    monkeypatch.setenv("NETPOL_EBPF_STATE_DIR", f"{tmp_path}/of-env")
    assert main(["status", "--config", str(file)]) == 4
    assert f"{tmp_path}/of-env/" in capsys.readouterr().err
    assert main(["status", "--config", str(written(tmp_path, "statedir: /a\n"))]) == 3
    assert "did you mean `stateDir`?" in capsys.readouterr().err


def test_agent_and_netpolctl_have_the_same_manifests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a path, `check` and `explain --manifests` read the agent's directory, from the file or by default."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "a.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    file = written(tmp_path, f"manifests: {manifests}\n")
    assert main(["check", "--config", str(file), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["objects"] == 1
    asked = ["explain", "--from", "192.0.2.1", "--to", "192.0.2.2", "--port", "1", "--config", str(file), "--manifests"]
    (manifests / "a.yaml").write_text("kind: [\n")
    assert main(asked) == 3
    assert f"{manifests}/a.yaml" in capsys.readouterr().err
    monkeypatch.setenv(CONFIG_VARIABLE, "none")
    assert main(["check"]) == 3
    assert str(DEFAULT_MANIFESTS) in capsys.readouterr().out


# --- who may write it ---------------------------------------------------------------------------------------------------


def mounted(tmp_path: Path) -> Path:
    """A file in a volume as a kubelet makes it: a link into ..data, which is a link to a directory with a date."""
    volume = tmp_path / "volume"
    for version in ("1", "2"):
        (volume / f"..{version}").mkdir(parents=True)
        (volume / f"..{version}" / "config.yaml").write_text(version)
    (volume / "..data").symlink_to("..1")
    (volume / "config.yaml").symlink_to("..data/config.yaml")
    return volume


def test_a_mounted_config_map_is_read(tmp_path: Path) -> None:
    """The file is read before and after the kubelet changes the link."""
    volume = mounted(tmp_path)
    assert load_trusted(volume / "config.yaml") == b"1"
    (volume / "..tmp").symlink_to("..2")
    (volume / "..tmp").rename(volume / "..data")
    assert load_trusted(volume / "config.yaml") == b"2"


def test_a_swap_while_the_file_is_opened_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target directory is gone when the file is opened, so the new one is read."""
    volume = mounted(tmp_path)
    real = configuration._follow

    def follow(path: Path) -> Path:
        found = real(path)
        if found.read_text() == "1":
            (volume / "..tmp").symlink_to("..2")
            (volume / "..tmp").rename(volume / "..data")
            (volume / "..1" / "config.yaml").unlink()
        return found

    monkeypatch.setattr(configuration, "_follow", follow)
    assert load_trusted(volume / "config.yaml") == b"2"


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The file can be written by its group or by everybody."""
    path = written(tmp_path, "")
    path.chmod(mode)
    with pytest.raises(InvalidInputError, match=REFUSED):
        parsed("--config", str(path))


def test_every_directory_on_the_way_is_checked(tmp_path: Path) -> None:
    """The directories of the name and of the link's target, and their parents.

    In a sticky one, others cannot replace our file.
    """
    for weak in ("above", "above/here", "target"):
        root = tmp_path / weak.replace("/", "-")
        (root / "above" / "here").mkdir(parents=True)
        (root / "target").mkdir()
        (root / "target" / "file").write_text("x")
        (root / "above" / "here" / "link").symlink_to("../../target/file")
        assert load_trusted(root / "above" / "here" / "link") == b"x"
        (root / weak).chmod(0o777)
        with pytest.raises(OSError, match=REFUSED):
            load_trusted(root / "above" / "here" / "link")
        (root / weak).chmod(0o1777)
        assert load_trusted(root / "above" / "here" / "link") == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts")
def test_a_writable_directory_on_a_read_only_mount_is_trusted(tmp_path: Path) -> None:
    """A kubelet makes the directory of a ConfigMap with mode 0777, and mounts it read-only."""
    volume = mounted(tmp_path)
    volume.chmod(0o777)
    with pytest.raises(OSError, match=REFUSED):
        load_trusted(volume / "config.yaml")
    mount = tmp_path / "mount"
    mount.mkdir()
    read = f"print(configuration.load_trusted(Path({str(mount / 'config.yaml')!r})))"
    source = f"from pathlib import Path\nfrom netpol_ebpf.agent import configuration\n{read}"
    mounting = f"mount --bind {volume} {mount} && mount -o remount,bind,ro {mount} && exec {sys.executable} -c {shlex.quote(source)}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", mounting], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "b'1'\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files to other users")
@pytest.mark.parametrize("what", ["..1/config.yaml", "..1", "..data", "."])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, what: str) -> None:
    """The file, a directory, or a link on the path belongs to another user."""
    volume = mounted(tmp_path)
    os.chown(volume / what, 12345, 12345, follow_symlinks=False)
    with pytest.raises(OSError, match="belongs to user 12345"):
        load_trusted(volume / "config.yaml")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """A pipe, a directory, a loop of links, a too large file, and one that is not UTF-8."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b"#" * (configuration.MOST_BYTES + 1))
    (tmp_path / "latin").write_bytes(b"\xff")
    for name in ("pipe", ".", "loop", "large", "latin"):
        with pytest.raises(InvalidInputError, match="cannot be read|is not UTF-8"):
            parsed("--config", str(tmp_path / name))


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_is_fresh_and_has_every_option() -> None:
    """The table is generated. A missing option means that the script does not read its parser."""
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "scripts/generate_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.rendered(page) == page
    for one in settings_of(build_parser()).values():
        assert f"| `{one.key}` | " in page
        assert f"`{one.variable}`" in page


def test_the_page_s_example_is_valid() -> None:
    """The example is valid without changes."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = configuration.parse_file(settings_of(build_parser()), example, "example")
    assert {dest: one.value for dest, one in found.items()} == {
        "kubeconfig": Path("/etc/netpol-ebpf/kubeconfig"),
        "barrier_interfaces": ["cali*"],
        "timeout": ["udp=180"],
    }
