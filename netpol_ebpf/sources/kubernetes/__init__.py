# SPDX-License-Identifier: Apache-2.0
"""Objects from a Kubernetes API server, watched for changes. Needs the extra ``[kubernetes]``."""
