# SPDX-License-Identifier: Apache-2.0
"""How hard the property tests try: `NETPOL_HYPOTHESIS` names the profile.

``quick`` (the default) suits every run of the test suite, ``thorough`` a night, ``fixed`` draws the same each time and
does not shrink (for scripts/mutation_check.py).  No profile has a deadline: a shared machine
is slow at times, and no test asserts on time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile("quick", max_examples=40, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("thorough", max_examples=5000, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "fixed",
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=_SLOW,
)
settings.load_profile(os.environ.get("NETPOL_HYPOTHESIS", "quick"))
