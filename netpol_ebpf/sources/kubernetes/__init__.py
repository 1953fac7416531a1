# SPDX-License-Identifier: Apache-2.0
"""Objects from a Kubernetes API server, followed as they change. Needs the extra ``[kubernetes]``."""
