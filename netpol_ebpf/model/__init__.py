# SPDX-License-Identifier: Apache-2.0
"""The reference model: slow and simple.

Its verdict is right by definition, and the other engines must give the same verdict.
"""

from netpol_ebpf.model.reference import ReferenceModel

__all__ = ["ReferenceModel"]
