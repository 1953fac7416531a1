# SPDX-License-Identifier: Apache-2.0
"""The guest's report: one JSON object a line, each behind the checksum of its text.

Whatever else is written to the same port (a kernel's dying words) is not taken for a record: a line counts only when its
checksum fits.  Both sides import this module, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def render_record(record: Mapping[str, Any]) -> bytes:
    """A line; ASCII only."""
    text = json.dumps(record, ensure_ascii=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse_report(content: bytes) -> list[dict[str, Any]]:
    """The records in the order they were written; an unfinished last line is left for later."""
    records = []
    for line in content.split(b"\n")[:-1]:
        checksum, _, text = line.rstrip(b"\r").partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            records.append(dict(json.loads(text)))
    return records
