# SPDX-License-Identifier: Apache-2.0
"""Check deploy/Dockerfile without a container runtime: by the image builders' parser, or by running its commands.

Without arguments: every instruction is known to this program, every copied file exists, every shell line parses, and
every base is a plain image name. With --build: mmdebstrap makes a root directory for each stage, RUN lines run in it by
chroot, and COPY lines copy; then the programs of the last stage are run. That needs root, and the Debian and Python
package mirrors of this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "deploy" / "Dockerfile"
KNOWN = frozenset({"FROM", "RUN", "COPY", "WORKDIR", "ENV", "CMD"})
PLAIN_NAME = re.compile(r"[a-z0-9]+:[a-z0-9.-]+")
"""Matches the name of an image without a registry."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""The certificates of this machine, for pip, because a mirror may have a certificate of its own."""
EXIT_WRONG, EXIT_PLATFORM = 1, 5
TRIALS = (
    ("netpol-agent", "--version"),
    ("netpolctl", "--version"),
    ("python3", "-c", "import netpol_ebpf.sources.kubernetes.source, netpol_ebpf.agent.metrics"),
    # The compiled file must be used, because the image has no compiler; and the plugin must run.
    ("/opt/netpol-ebpf/bin/python", "-c", "from netpol_loader.pins import build; build.compiled_program(keep=False)"),
    ("/opt/netpol-ebpf/bin/python", "-c", "from netpol_ebpf.cni import installation; installation._load_program()"),
    ("sleep", "0"),
)
"""Commands of the last stage that must succeed."""


@dataclass
class Stage:
    """A stage: its base, its name ("" if it has none), and its instructions after FROM."""

    base: str
    name: str
    lines: list[dockerfile.Command] = field(default_factory=list)


def load_stages() -> list[Stage]:
    """Parse the stages of the file."""
    stages: list[Stage] = []
    for line in dockerfile.parse_file(str(FILE)):
        if line.cmd.upper() == "FROM":
            base, *alias = line.value
            stages.append(Stage(base, alias[1] if alias else ""))
        else:
            stages[-1].lines.append(line)
    return stages


def faults(stages: list[Stage]) -> Iterator[str]:
    """The faults of the file, one text for each."""
    names: set[str] = set()
    for stage in stages:
        if not PLAIN_NAME.fullmatch(stage.base):
            yield f"FROM {stage.base}: expected a plain image name with a tag"
        for line in stage.lines:
            where = f"line {line.start_line}"
            if line.cmd.upper() not in KNOWN:
                yield f"{where}: {line.cmd} is not known here"
            elif line.cmd.upper() == "COPY":
                sources = line.value[:-1]
                of_stage = [flag.removeprefix("--from=") for flag in line.flags]
                if of_stage and of_stage[0] not in names:
                    yield f"{where}: there is no stage {of_stage[0]} before"
                for source in sources if not of_stage else ():
                    if not (ROOT / source).exists():
                        yield f"{where}: there is no {source}"
            elif line.cmd.upper() == "RUN":
                done = subprocess.run(["sh", "-n", "-c", line.value[0]], capture_output=True, text=True, check=False)
                if done.returncode:
                    yield f"{where}: {done.stderr.strip()}"
        names.add(stage.name)


class Built:
    """A stage, built as a root directory."""

    def __init__(self, place: Path, stage: Stage) -> None:
        self.place = place
        self._directory = "/"
        self._variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self._variables["PIP_CERT"] = "/etc/certificates-of-the-machine.pem"
        suite = stage.base.partition(":")[2].removesuffix("-slim")
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", suite, str(place)], check=True)
        shutil.copyfile("/etc/resolv.conf", place / "etc/resolv.conf")
        shutil.copyfile(CERTIFICATES, place / "etc/certificates-of-the-machine.pem")

    def apply(self, line: dockerfile.Command, stages: dict[str, Built]) -> None:
        """Execute an instruction."""
        command = line.cmd.upper()
        if command == "RUN":
            print(f"==> RUN {line.value[0]}", flush=True)
            self.run("sh", "-e", "-c", line.value[0])
        elif command == "WORKDIR":
            self._directory = line.value[0]
            (self.place / self._directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif command == "ENV":
            self._variables[line.value[0]] = line.value[1]
        elif command == "COPY":
            *sources, target = line.value
            root = stages[line.flags[0].removeprefix("--from=")].place if line.flags else ROOT
            place = self.place / str(Path(self._directory) / target).lstrip("/")
            for source in sources:
                self._copy(root / source.lstrip("/"), place, is_into=target.endswith("/"))

    @staticmethod
    def _copy(source: Path, target: Path, *, is_into: bool) -> None:
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "netpol-cni") if source.is_relative_to(ROOT) else None
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=skipped)
        else:
            if is_into:
                target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def run(self, *command: str) -> None:
        """Run a command inside the root directory, with a /proc of its own."""
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        inside = ["env", "--ignore-environment", f"--chdir={self._directory}", *variables, *command]
        mounts = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
        subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", mounts, str(self.place), *inside], check=True
        )


def build(stages: list[Stage]) -> None:
    """Build all stages, and run the programs of the last one."""
    with tempfile.TemporaryDirectory(prefix="netpol-image-") as work:
        built: dict[str, Built] = {}
        for number, stage in enumerate(stages):
            one = Built(Path(work) / str(number), stage)
            for line in stage.lines:
                one.apply(line, built)
            built[stage.name] = one
        for command in TRIALS:
            print(f"==> trial: {' '.join(command)}", flush=True)
            built[stages[-1].name].run(*command)
        size = subprocess.run(
            ["du", "--summarize", "--block-size=M", str(built[stages[-1].name].place)],
            check=True, capture_output=True, text=True,
        ).stdout.split()[0]  # fmt: skip
        print(f"the last stage has {size}B")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="run the file, without a container runtime")
    arguments = parser.parse_args()
    stages = load_stages()
    wrong = list(faults(stages))
    for text in wrong:
        print(f"{FILE.relative_to(ROOT)}: {text}", file=sys.stderr)
    if wrong:
        return EXIT_WRONG
    if arguments.build:
        if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
            print("--build needs root and mmdebstrap", file=sys.stderr)
            return EXIT_PLATFORM
        build(stages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
