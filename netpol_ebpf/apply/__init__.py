# SPDX-License-Identifier: Apache-2.0
"""Writes compiled tables to the kernel maps, make before break."""
