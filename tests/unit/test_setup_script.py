# SPDX-License-Identifier: Apache-2.0
"""The set-up script where it has nothing to set up: other distributions, wrong arguments, a second run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup.sh"


def run(os_release: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script on a machine that says it is what the file says; it must not get as far as changing anything."""
    environment = {**os.environ, "NETPOL_OS_RELEASE": str(os_release), "NETPOL_VENV": "/nonexistent/venv"}
    return subprocess.run([str(SCRIPT), *arguments], check=False, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'ID=fedora\nVERSION_ID=40\nPRETTY_NAME="Fedora Linux 40"\n',
            ["Fedora Linux 40", "dnf install", "python3-bcc"],
        ),
        ("ID=arch\nPRETTY_NAME='Arch Linux'\n", ["Arch Linux", "pacman -S", "python-bcc"]),
        ('ID=opensuse-leap\nVERSION_ID="15.6"\n', ["opensuse-leap", "zypper install"]),
        ('ID=debian\nVERSION_ID="11"\nPRETTY_NAME="Debian 11"\n', ["Debian 11", "Debian 12 or newer"]),
        ('ID=ubuntu\nVERSION_ID="20.04"\nPRETTY_NAME="Ubuntu 20.04"\n', ["Ubuntu 20.04", "Ubuntu 22.04 or newer"]),
        ("", ["an unknown distribution"]),
    ],
)
def test_elsewhere_it_says_what_to_install(tmp_path: Path, text: str, said: list[str]) -> None:
    """Exit code 5, the packages, and the commands that follow; nothing is installed."""
    os_release = tmp_path / "os-release"
    os_release.write_text(text)
    done = run(os_release)
    assert done.returncode == 5
    assert done.stdout == ""
    wanted = [
        *said,
        "iproute2",
        "iperf3",
        "bpftool",
        "-m venv --system-site-packages .venv",
        "[kubernetes]",
        "netpolctl demo",
    ]
    assert [word for word in wanted if word not in done.stderr] == []


def test_without_the_file_it_is_an_unknown_distribution(tmp_path: Path) -> None:
    """A machine without /etc/os-release gets the same advice."""
    done = run(tmp_path / "absent")
    assert done.returncode == 5
    assert "an unknown distribution" in done.stderr


def test_a_wrong_argument_is_a_usage_error(tmp_path: Path) -> None:
    """Exit code 2, before anything else is looked at."""
    done = run(tmp_path / "absent", "--develop")
    assert done.returncode == 2
    assert "unknown argument --develop" in done.stderr
