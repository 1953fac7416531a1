# SPDX-License-Identifier: Apache-2.0
"""The source for a cluster: objects of a Kubernetes API server, which is watched for changes.

It needs the extra ``[kubernetes]``.
"""
