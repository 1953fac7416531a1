#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# See it work, on a fresh machine: set up what is missing, then run the demonstration. Arguments go to `netpolctl demo`.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$ROOT/scripts/setup.sh"
exec "${NETPOL_VENV:-$ROOT/.venv}/bin/netpolctl" demo "$@"
