# SPDX-License-Identifier: Apache-2.0
"""The control plane's read and write access to the program's tables. Knows their layouts, not pins or policy."""
