# SPDX-License-Identifier: Apache-2.0
"""bpf(2) and facts about the running kernel: system calls, maps, types, clocks, grace periods.

No module here knows a map by its name.
"""
