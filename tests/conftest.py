# SPDX-License-Identifier: Apache-2.0
"""No test, and no program that a test starts, reads the configuration of the machine that it runs on."""

from __future__ import annotations

import os

from netpol_ebpf.agent.configuration import CONFIG_VARIABLE, NO_FILE, PREFIX
from netpol_ebpf.agent.source_options import NODE_VARIABLE

for name in [one for one in os.environ if one.startswith(PREFIX) or one == NODE_VARIABLE]:
    del os.environ[name]
os.environ[CONFIG_VARIABLE] = NO_FILE
