# SPDX-License-Identifier: Apache-2.0
"""The guest's report: one JSON object in each line, after the checksum of its text.

Other text on the same port (the last messages of a kernel) is not taken for a record: a line counts only if its
checksum is correct. Guest and host import this module, so it needs only the standard library.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def render_record(record: Mapping[str, Any]) -> bytes:
    """Render a line, in ASCII only."""
    text = json.dumps(record, ensure_ascii=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse_report(content: bytes) -> list[dict[str, Any]]:
    """The records in the order in which they were written. An unfinished last line is left for later."""
    records = []
    for line in content.split(b"\n")[:-1]:
        checksum, _, text = line.rstrip(b"\r").partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            records.append(dict(json.loads(text)))
    return records
