# SPDX-License-Identifier: Apache-2.0
"""From the resources users write to the internal policy model: one module for each family, and `Derivation` over all.

Public: `Derivation`, `derive`, `ResourceKey`, `key_of`.
"""

from netpol_ebpf.policy.translate.derivation import Derivation, derive, key_of
from netpol_ebpf.policy.types import ResourceKey

__all__ = ["Derivation", "ResourceKey", "derive", "key_of"]
