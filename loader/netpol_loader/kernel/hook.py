# SPDX-License-Identifier: Apache-2.0
"""Where a program sits. A *direction* is the policy's view and another type; the conversion is here.

Must not know of policy: directions appear as the numbers of `netpol_loader.abi`.
"""

from __future__ import annotations

import enum

from netpol_loader import abi


class Hook(enum.Enum):
    """A place on a host-side interface. The value is the name of the program for it."""

    TC_INGRESS = "np_tc_ingress"
    TC_EGRESS = "np_tc_egress"

    def direction(self, *, host: bool = False) -> int:
        """The endpoint's direction (``abi.NP_DIRECTION_*``) of packets at this hook.

        What enters the host from a workload's interface is the workload's egress; on a ``host`` endpoint's own
        interface the names agree.
        """
        towards_endpoint = (self is Hook.TC_INGRESS) == host
        return abi.NP_DIRECTION_INGRESS if towards_endpoint else abi.NP_DIRECTION_EGRESS
