# SPDX-License-Identifier: Apache-2.0
"""Writes compiled tables to the kernel's maps. A row is written before other rows refer to it (make before break)."""
