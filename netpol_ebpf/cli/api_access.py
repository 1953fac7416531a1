# SPDX-License-Identifier: Apache-2.0
"""Access to an API server for the commands that query one: the options ``--kubeconfig`` and ``--context``.

The credentials are those of the user, found as kubectl finds them. The agent's own option ``--kubeconfig`` is not used.
"""

from __future__ import annotations

import argparse

from netpol_ebpf.sources.kubernetes.client import Client
from netpol_ebpf.sources.kubernetes.kubeconfig import find_cluster


def add_api_options(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--kubeconfig`` and ``--context``."""
    parser.add_argument(
        "--kubeconfig", default="", metavar="FILE",
        help="kubeconfig (default: as kubectl, KUBECONFIG, ~/.kube/config, or the service account of this pod)",
    )  # fmt: skip
    parser.add_argument("--context", default="", metavar="NAME", help="context of the kubeconfig")


def open_api(arguments: argparse.Namespace) -> Client:
    """A client of the API server that the options name. Raises InvalidInputError."""
    return Client(find_cluster(arguments.kubeconfig, arguments.context))
