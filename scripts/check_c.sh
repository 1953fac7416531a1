#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Check the packet path and the CNI plugin as plain C: compile them with clang, where every warning is an error, then
# check the format. check_c/bcc.h declares the helpers that BCC provides.
set -euo pipefail
cd "$(dirname "$0")/.."

check=(clang -fsyntax-only -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Wno-implicit-int-conversion -Werror)
"${check[@]}" -std=gnu11 -Wno-unknown-pragmas -Wno-pass-failed -include scripts/check_c/bcc.h bpf/netpol.c
"${check[@]}" -std=c11 -D_GNU_SOURCE cni/*.c
echo "check_c: clean under -Wall -Wextra -Werror"

if command -v clang-format >/dev/null; then
    clang-format --dry-run --Werror bpf/*.c bpf/*.h cni/*.c cni/*.h scripts/check_c/*.h
    echo "check_c: formatted"
else
    echo "check_c: clang-format is not installed; the format was not checked" >&2
    exit 1
fi
