# SPDX-License-Identifier: Apache-2.0
"""The agent with its least privileges, and what other users may see of it: real agents, verdicts and users.

The pins are on a BPF file system of the test's own, so no other one must be opened for a group.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import service_filter
from agent_scene import DB_POLICY, NODE, OTHER_ALLOWED, Scene, scene_in, to_db, wait_for, with_capabilities

from netpol_ebpf.agent.configuration import API_VERSION, KIND
from netpol_ebpf.agent.control_socket import SOCKET_NAME, ask
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.patience import scaled
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.pins import access
from netpol_loader.pins.doctor import CAPABILITIES

pytestmark = pytest.mark.netns

NAMES = tuple(one.name.removeprefix("CAP_").lower() for one in CAPABILITIES)
AGENT, STRANGER, MEMBER = 4242, 4243, 4244
"""Ids of users that need no entry in any file. Arbitrary."""
GROUP = "daemon"
"""A group that every distribution has."""


@dataclass
class LeastScene(Scene):
    """An agent with some capabilities, as root or as another user. ``is_service``: as in the unit.

    The service has its options from the configuration file, and only the system calls of the unit's filter.
    """

    capabilities: tuple[str, ...] = NAMES
    user: int = 0
    is_service: bool = False

    def command(self, *options: str) -> list[str]:
        prefix = with_capabilities(self.capabilities)
        if self.user:
            prefix += ["--ambient-caps", prefix[-1], "--reuid", str(self.user), "--regid", str(self.user)]
        member = str(grp.getgrnam(GROUP).gr_gid)
        prefix += ["--groups", member]
        if not self.is_service:
            return [*prefix, *super().command(*options)]
        places = {"manifests": self.manifests, "pinRoot": self.pin_root, "stateDir": self.state_dir}
        written = {name: str(path) for name, path in places.items()} | {"node": self.node}
        text = yaml.safe_dump({"apiVersion": API_VERSION, "kind": KIND, **written})
        self.configuration.write_text(text)
        filtered = [sys.executable, service_filter.__file__, sys.executable, *self.entry]
        return [*prefix, *filtered, "--config", str(self.configuration), *options]

    @property
    def configuration(self) -> Path:
        return self.home / "config.yaml"

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """See `Scene`. Here root has only the agent's capabilities, and one more that opens another user's pins."""
        prefix = [] if self.user else with_capabilities(self.capabilities)
        return self.lab.run(NODE, [*prefix, sys.executable, "-m", "netpol_ebpf.cli.main", *arguments], check=False)

    def prepare(self) -> None:
        """Make what the service manager makes for an agent that is not root: its directories."""
        for path in (self.pin_root, self.state_dir):
            path.mkdir(parents=True)
            os.chown(path, self.user, self.user)


@pytest.fixture(scope="module")
def bpffs() -> Iterator[Path]:
    """A BPF file system with directories that every user may pass."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory(prefix="netpol-privilege-") as name:
        Path(name).chmod(0o755)
        assert libc.mount(b"bpf", name.encode(), b"bpf", 0, b"mode=0755") == 0, os.strerror(ctypes.get_errno())
        try:
            yield Path(name)
        finally:
            assert libc.umount2(name.encode(), 0) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that every user may pass, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="netpol-privilege-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "home"


@pytest.fixture
def make(lab: Lab, home: Path, bpffs: Path) -> Iterator[Callable[..., LeastScene]]:
    """Yields a function that makes scenes, one at a time."""
    made: list[Any] = []

    def one(**options: Any) -> LeastScene:
        made.append(scene_in(lab, home, pin_root=bpffs / "own", kind=LeastScene, **options))
        scene = made[-1].__enter__()
        assert isinstance(scene, LeastScene)
        return scene

    yield one
    for context in made:
        context.__exit__(None, None, None)


def capabilities_of(process: int) -> dict[str, int]:
    """The capability sets of a process, by the kernel's names."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}


def abort_as_watchdog(scene: LeastScene) -> None:
    """End the agent as systemd's watchdog does. The log then has the stack of each thread."""
    assert scene.process is not None
    scene.process.send_signal(signal.SIGABRT)
    assert scene.process.wait(scaled(30)) == -signal.SIGABRT
    log = (scene.home / "agent.log").read_text()
    assert "Fatal Python error: Aborted" in log
    assert "in run_once" in log


def require_filter() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")


@pytest.mark.parametrize(
    ("user", "is_service"), [(0, False), (AGENT, False), (0, True)], ids=["root", "user", "service"]
)
def test_least_privilege_is_enough_for_everything(
    make: Callable[..., LeastScene], user: int, *, is_service: bool
) -> None:
    """With only three capabilities the agent finds pods, judges, applies changes, is replaced, and is cleaned up.

    It also does so as the service: with only the configuration file, which netpolctl reads too, and under the unit's
    filter.
    """
    if is_service:
        require_filter()
    scene = make(user=user, is_service=is_service)
    if user:
        scene.prepare()
    state = scene.start()
    assert state["in_force"]
    # Sockets inside pods, for older connections, are the only information for which more capabilities are needed.
    assert {one["slug"] for one in state["problems"]} <= {"adoption"}
    sets = capabilities_of(state["pid"])
    expected = sum(1 << one.number for one in CAPABILITIES)
    assert (sets["CapEff"], sets["CapPrm"], sets["CapBnd"]) == (expected, expected, expected)
    assert ("Seccomp:\t2" in Path(f"/proc/{state['pid']}/status").read_text().splitlines()) is is_service
    assert Path(f"/proc/{state['pid']}").stat().st_uid == user
    if is_service:
        command = ["status", "--config", str(scene.configuration), "-o", "json"]
        told = wait_for(lambda: scene.ctl(*command).stdout, "netpolctl finds the agent by the file")
        assert json.loads(told)["pid"] == state["pid"]
    both = [to_db(source, version) for source in ("shop/web", "shop/other") for version in (4, 6)]
    assert scene.reached(*both) == [True, True, False, False]
    scene.write("db.yaml", OTHER_ALLOWED)
    scene.await_reached(to_db("shop/other"), expected=True)
    if is_service:
        abort_as_watchdog(scene)
    scene.kill()
    scene.write("db.yaml", DB_POLICY)
    assert scene.start()["in_force"]
    assert scene.reached(*both) == [True, True, False, False]
    (next(scene.pin_root.glob("v*")) / "np_rule").unlink()
    scene.await_status(lambda now: now["drift"]["put_back"].get("pin"), "a pin is put back")
    scene.stop()
    assert scene.cleanup().returncode == 0
    assert scene.attached() == {}
    assert scene.reached(to_db("shop/other")) == [True]


def test_the_filter_of_the_service_denies_the_rest() -> None:
    """The calls that the agent needs are permitted. One that it does not need, and one of another set, are not."""
    require_filter()
    calls = service_filter.permitted(service_filter.UNIT.read_text())
    assert {"bpf", "socket", "execve", "clone3", "setpriority"} <= calls
    denied = {"setns", "unshare", "mount", "ptrace", "setuid", "keyctl", "init_module", "kexec_load", "reboot"}
    assert calls & denied == set()
    asked = "import os, sys; sys.exit(0 if os.geteuid() == 0 else 1)"
    filtered = [sys.executable, service_filter.__file__, sys.executable, "-c"]
    assert subprocess.run([*filtered, asked], check=False).returncode == 0
    done = subprocess.run([*filtered, "import os; os.setuid(1)"], check=False, capture_output=True, text=True)
    assert "PermissionError: [Errno 1]" in done.stderr


def test_more_capabilities_show_sockets_inside_pods(make: Callable[..., LeastScene]) -> None:
    """With CAP_SYS_ADMIN at the first start, the agent can read everything."""
    scene = make(capabilities=(*NAMES, "sys_admin"))
    assert scene.start()["problems"] == []


@pytest.mark.parametrize("gone", CAPABILITIES, ids=lambda one: one.name)
def test_without_a_capability_the_agent_says_which(make: Callable[..., LeastScene], gone: Any) -> None:
    """One line names the missing capability and its purpose, and nothing was changed."""
    scene = make(capabilities=tuple(set(NAMES) - {gone.name.removeprefix("CAP_").lower()}))
    done = scene.lab.run(NODE, scene.command("--once"), check=False)
    assert done.returncode == 5
    assert f"netpol-agent: error: this process lacks {gone.name} ({gone.purpose})" in done.stderr.splitlines()
    assert not scene.pin_root.exists()


# --- who may look ---------------------------------------------------------------------------------------------------


def as_user(user: int, groups: list[int], look: Callable[[], Any]) -> Any:
    """The result of a function, or the text of its error, in a process of another user without capabilities."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.setgroups(groups)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        try:
            answer = look()
        except (OSError, UnreachableError) as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        text = answers.read()
    os.waitpid(process, 0)
    return json.loads(text)


def opened(path: Path, flags: int) -> str:
    os.close(syscall.obj_get(path, flags))
    return "opened"


def ask_directly(path: Path, operation: str) -> Any:
    (answer,) = ask(path, {"op": operation})
    return answer if operation != "status" else answer["in_force"]


def test_group_may_read_and_nobody_else(make: Callable[..., LeastScene]) -> None:
    """A member of the group can query the agent and read maps.

    It can write no map, and open no secrets, programs, links or locks.
    """
    scene = make(options=("--group", GROUP))
    scene.start()
    group = grp.getgrnam(GROUP).gr_gid
    path, pins = scene.state_dir / SOCKET_NAME, next(scene.pin_root.glob("v*"))

    def member(look: Callable[[], Any]) -> Any:
        return as_user(MEMBER, [group], look)

    def stranger(look: Callable[[], Any]) -> Any:
        return as_user(STRANGER, [], look)

    assert member(lambda: ask_directly(path, "status")) is True
    assert "Permission denied" in stranger(lambda: ask_directly(path, "status"))
    maps = set(abi.MAP_SPECS)
    assert maps <= set(member(lambda: sorted(one.name for one in pins.iterdir())))
    for name in sorted(maps):
        if name in access.PRIVATE:
            assert "PermissionError" in member(partial(opened, pins / name, syscall.BPF_F_RDONLY)), name
        else:
            assert member(partial(opened, pins / name, syscall.BPF_F_RDONLY)) == "opened", name
        assert "PermissionError" in member(partial(opened, pins / name, 0)), name
        assert "PermissionError" in stranger(partial(opened, pins / name, syscall.BPF_F_RDONLY)), name
    for one in (pins / "programs", pins / "programs" / "np_tc_ingress", pins / "programs" / "np_call", pins / "links"):
        assert "PermissionError" in member(partial(opened, one, syscall.BPF_F_RDONLY)), one
    for place in (
        scene.pin_root,
        scene.state_dir,
        pins / "links",
        scene.state_dir / "lock",
        scene.state_dir / "numbers",
    ):
        assert "PermissionError" in member(partial(os.open, place, os.O_RDONLY)), place
    assert "PermissionError" in stranger(lambda: [str(one) for one in pins.iterdir()])

    (pins / "np_rule").chmod(0o666)
    scene.await_status(lambda now: now["drift"]["put_back"].get("pin"), "the mode of a pin is put back")
    assert (pins / "np_rule").stat().st_mode & 0o777 == 0o640


def test_without_a_group_only_root_looks(make: Callable[..., LeastScene]) -> None:
    """Every pin, the socket and the state are closed to others, groups included. Root gets answers."""
    scene = make()
    scene.start()
    ours = [scene.pin_root, *scene.pin_root.rglob("*"), scene.state_dir, *scene.state_dir.rglob("*")]
    assert len(ours) > len(abi.MAP_SPECS)
    assert [str(path) for path in ours if path.stat().st_mode & 0o077 and path.parent.stat().st_mode & 0o077] == []
    assert ask_directly(scene.state_dir / SOCKET_NAME, "status") is True
    group = grp.getgrnam(GROUP).gr_gid
    assert "Permission denied" in as_user(
        MEMBER, [group], lambda: ask_directly(scene.state_dir / SOCKET_NAME, "status")
    )


def test_socket_asks_who_connects_whatever_its_mode(make: Callable[..., LeastScene]) -> None:
    """Even if the file's mode lets everybody connect, the agent answers only root and the group."""
    scene = make(options=("--group", GROUP))
    scene.start()
    group, path = grp.getgrnam(GROUP).gr_gid, scene.state_dir / SOCKET_NAME
    scene.state_dir.chmod(0o755)
    path.chmod(0o666)
    assert "only root and members" in as_user(STRANGER, [], lambda: ask_directly(path, "status"))
    assert "only root and members" in as_user(STRANGER, [], lambda: ask_directly(path, "rules"))
    assert as_user(MEMBER, [group], lambda: ask_directly(path, "status")) is True


def open_files(pid: int) -> set[str]:
    """The open files of a process, by the names of its links. Files that it closes meanwhile are left out."""
    found = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(one.readlink().name)
    return found


def network_sockets(pid: int) -> dict[str, list[str]]:
    """The lines of /proc/net about sockets of the process, by family, only for network families."""
    held = {name for name in open_files(pid) if name.startswith("socket:")}
    found: dict[str, list[str]] = {}
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "udplite", "packet", "unix", "netlink"):
        table = Path(f"/proc/{pid}/net/{name}")
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        found[name] = [line for line in lines if held & {f"socket:[{field}]" for field in line.split()}]
    assert found.pop("netlink"), "the agent's own sockets are seen in these tables"
    del found["unix"]
    return {name: lines for name, lines in found.items() if lines}


def test_agent_listens_on_no_network(make: Callable[..., LeastScene]) -> None:
    """In the node's network namespace only the laboratory's own servers listen. The agent has no such socket."""
    scene = make()
    assert network_sockets(scene.start()["pid"]) == {}


@pytest.mark.parametrize("user", [0, AGENT], ids=["root", "user"])
def test_agent_listens_at_its_health_address_alone(make: Callable[..., LeastScene], user: int) -> None:
    """With --health-address there is one listening socket, at that address.

    Three capabilities suffice, and its server has none.
    """
    pytest.importorskip("prometheus_client", reason="the extra [metrics] is not installed")
    scene = make(options=("--health-address", "127.0.0.1:9976"), user=user)
    scene.prepare()
    pid = scene.start()["pid"]
    sockets = network_sockets(pid)
    assert {name: [line.split()[1:4:2] for line in lines] for name, lines in sockets.items()} == {
        "tcp": [["0100007F:26F8", "0A"]]
    }
    for path, found in (("/readyz", b"[+]programmed ok"), ("/metrics", b"netpol_in_force 1.0")):
        command = [
            sys.executable,
            "-c",
            f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:9976{path}').read().decode())",
        ]
        wait_for(lambda: found.decode() in scene.lab.run(NODE, command, check=False).stdout, path)  # noqa: B023 - called at once
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    servers = [one for one in children if b"health_server" in Path(f"/proc/{one}/cmdline").read_bytes()]
    assert len(servers) == 1
    kept = capabilities_of(servers[0])
    assert {name: kept[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapAmb"), 0
    )


def test_group_reads_with_the_command_line(make: Callable[..., LeastScene]) -> None:
    """`status`, `get`, `flows`, `metrics` and `explain` work for a member without capabilities or manifests."""
    scene = make(options=("--group", GROUP))
    scene.start()
    group = str(grp.getgrnam(GROUP).gr_gid)
    assert scene.reached(to_db("shop/other")) == [False]
    prefix = ["setpriv", "--reuid", str(MEMBER), "--regid", str(MEMBER), "--groups", group, "--bounding-set", "-all"]
    scene.manifests.chmod(0o700)
    shown = {}
    explain = "explain --from shop/web --to shop/db --port 5432"
    for command in ("status", "get rules", "get connections", "flows", "metrics", explain):
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "netpol_ebpf.cli.main", *command.split(), "--state-dir", str(scene.state_dir)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown[command] = done.stdout
    assert f"{scene.manifests}/db.yaml" in shown[explain]
    assert "in force   yes" in shown["status"]
    assert "netpol_in_force 1.0" in shown["metrics"].splitlines()
    assert 'netpol_packets_total{reason="policy-deny"}' in shown["metrics"]
