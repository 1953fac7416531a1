#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up what is missing on this machine, then run the demonstration. The arguments are passed to `netpolctl demo`.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$ROOT/scripts/setup.sh"
exec "${NETPOL_VENV:-$ROOT/.venv}/bin/netpolctl" demo "$@"
