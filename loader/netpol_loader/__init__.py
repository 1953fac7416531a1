# SPDX-License-Identifier: Apache-2.0
"""Everything that talks to the kernel: compile (BCC), load, pin and attach programs, read and write maps.

The package knows nothing of policy.
"""
