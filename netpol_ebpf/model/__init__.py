# SPDX-License-Identifier: Apache-2.0
"""The reference model: plain, slow, obviously right; imports nothing of the compiler."""
