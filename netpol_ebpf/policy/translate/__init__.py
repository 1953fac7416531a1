# SPDX-License-Identifier: Apache-2.0
"""Translates the resources that users write into the internal policy model.

One module translates each family of kinds; `Derivation` uses all of them.

Public: `Derivation`, `derive`, `ResourceKey`, `key_of`.
"""

from netpol_ebpf.policy.translate.derivation import Derivation, derive, key_of
from netpol_ebpf.policy.types import ResourceKey

__all__ = ["Derivation", "ResourceKey", "derive", "key_of"]
