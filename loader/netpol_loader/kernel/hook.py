# SPDX-License-Identifier: Apache-2.0
"""TC hooks, and the conversion from a hook to a policy direction, which is another type.

The module must not know policy. A direction is a number of `netpol_loader.abi`.
"""

from __future__ import annotations

import enum

from netpol_loader import abi


class Hook(enum.Enum):
    """A TC hook of an interface. The value is the name of the program for the hook."""

    TC_INGRESS = "np_tc_ingress"
    TC_EGRESS = "np_tc_egress"

    def direction(self, *, host: bool = False) -> int:
        """The policy direction (``abi.NP_DIRECTION_*``) of packets at this hook.

        At a workload's interface, a packet at TC ingress leaves the workload, so its direction is egress. ``host``: the
        interface is a host endpoint's, where hook and direction have the same name.
        """
        towards_endpoint = (self is Hook.TC_INGRESS) == host
        return abi.NP_DIRECTION_INGRESS if towards_endpoint else abi.NP_DIRECTION_EGRESS
