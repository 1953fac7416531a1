# SPDX-License-Identifier: Apache-2.0
"""Sizes of the maps in the kernel tests: small, so that loading is quick and tests can fill tables."""

from __future__ import annotations

SIZES = {
    "np_endpoint": 64, "np_addr4": 4096, "np_addr6": 4096, "np_cidr4": 1024, "np_cidr6": 1024, "np_peer_class": 1024,
    "np_l4_col": 256, "np_verdict": 4096, "np_rule": 256, "np_rule_count": 256, "np_conn4": 4096, "np_conn6": 4096,
    "np_frag4": 1024, "np_frag6": 1024, "np_log_limit": 16, "np_event": 65536, "np_flow_cache4": 8192, "np_flow_cache6": 8192,
}  # fmt: skip
