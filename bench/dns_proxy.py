# SPDX-License-Identifier: Apache-2.0
"""A small DNS proxy in user space, beside which `bench/names.py` measures: it reads each answer, then passes it on.

    python bench/dns_proxy.py ADDRESS SERVER PORT

It listens at ADDRESS, asks SERVER, and notes names and addresses as a proxy that enforces policy would. One question at
a time, by UDP. It must not be used for anything else.
"""

from __future__ import annotations

import socket
import sys

import dns.message
import dns.rdatatype


def main() -> None:
    """Pass on questions and answers until the process is ended."""
    own, server, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    learned: dict[str, str] = {}
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as front,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back,
    ):
        front.bind((own, port))
        back.connect((server, port))
        while True:
            data, client = front.recvfrom(4096)
            asked = str(dns.message.from_wire(data).question[0].name)
            back.send(data)
            found = back.recv(4096)
            for records in dns.message.from_wire(found).answer:
                if records.rdtype == dns.rdatatype.A:
                    learned.update((record.to_text(), asked) for record in records)
            front.sendto(found, client)


if __name__ == "__main__":
    main()
