# SPDX-License-Identifier: Apache-2.0
"""The reference model: slow, plain, and the authority on every verdict."""

from netpol_ebpf.model.reference import ReferenceModel

__all__ = ["ReferenceModel"]
