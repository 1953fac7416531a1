# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of the house: compile (BCC), load, pin, attach, read and write maps. Knows nothing of policy."""
