# SPDX-License-Identifier: Apache-2.0
"""The reference model: slow and simple; its verdict is right by definition, and other engines must give the same."""

from netpol_ebpf.model.reference import ReferenceModel

__all__ = ["ReferenceModel"]
