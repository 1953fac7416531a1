# SPDX-License-Identifier: Apache-2.0
"""bpf(2) and what the running kernel says of itself: system calls, maps, types, clocks, grace periods. Knows no map by name."""
