# SPDX-License-Identifier: Apache-2.0
"""The syntax of values in fields: names, labels, port names, addresses and CIDRs.

Each ``check_*`` function returns a message with the fault and the permitted form, or None.  Each ``parse_*`` function
raises ValueError with such a message.  The rules are those of Kubernetes' apimachinery validation, unless a docstring
names another source.  Messages have no position, because callers add path and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netpol_ebpf.resources.types import IPAddress, IPNetwork

MAX_NAME = 253
MAX_LABEL = 63
MAX_PORT = 65535

_DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?\Z")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*\Z")
_QUALIFIED = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?\Z")
_SERVICE_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:-?[a-z0-9])*\Z")
_RANGE = re.compile(r"([0-9]+)[-:._]+([0-9]+)\Z")

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


def check_dns_label(text: str) -> str | None:
    """Check an RFC 1123 label, the form of a namespace's name."""
    if len(text) > MAX_LABEL:
        return f"must have at most {MAX_LABEL} characters, has {len(text)}"
    if not _DNS_LABEL.match(text):
        return (
            f'must hold only lower-case letters, digits and "-", and begin and end with a letter or digit; is "{text}"'
        )
    return None


def check_dns_subdomain(text: str) -> str | None:
    """Check an RFC 1123 subdomain, the form of most objects' names."""
    if len(text) > MAX_NAME:
        return f"must have at most {MAX_NAME} characters, has {len(text)}"
    if not _DNS_SUBDOMAIN.match(text):
        return (
            'must hold only lower-case letters, digits, "-" and ".", and each part between dots must begin and end '
            f'with a letter or digit; is "{text}"'
        )
    return None


@lru_cache(maxsize=4096)
def check_label_key(key: str) -> str | None:
    """Check a qualified name: a name, optionally after a DNS prefix and "/"."""
    prefix, slash, name = key.rpartition("/")
    if slash and (not prefix or check_dns_subdomain(prefix) is not None):
        return f'the part before "/" of the label name "{key}" must be a DNS name such as example.com'
    if not name or len(name) > MAX_LABEL or not _QUALIFIED.match(name):
        return (
            f'"{key}" is no label name: at most {MAX_LABEL} letters, digits, "-", "_" and ".", beginning and ending with '
            'a letter or digit, and optionally a DNS prefix and "/" before it'
        )
    return None


@lru_cache(maxsize=4096)
def check_label_value(value: str) -> str | None:
    """Check a label value: empty, or up to 63 characters."""
    if value and (len(value) > MAX_LABEL or not _QUALIFIED.match(value)):
        return (
            f'"{value}" is no label value: at most {MAX_LABEL} letters, digits, "-", "_" and ".", beginning and ending '
            "with a letter or digit (or empty)"
        )
    return None


def check_label(key: str, value: str) -> str | None:
    """Check a label's name and value."""
    return check_label_key(key) or check_label_value(value)


def check_port_name(name: str) -> str | None:
    """Check an IANA service name, as Kubernetes requires of port names."""
    if len(name) <= 15 and _SERVICE_NAME.match(name) and not name.isdigit():  # noqa: PLR2004 - RFC 6335
        return None
    if name.isascii() and name.isdigit():
        return f'is the text "{name}"; write the number without quotes: {name}'
    ends = _RANGE.match(name)
    hint = f"; a range has its first port here and its last, {ends[2]}, in `endPort`" if ends else ""
    return (
        "must be a port number, or a port name: at most 15 lower-case letters, digits and single dashes, with at least "
        f'one letter, beginning and ending with a letter or digit; is "{name}"{hint}'
    )


def _strip_zeros(text: str) -> str:
    """Remove leading zeros from IPv4 octets, so that the octets are read as decimal.

    Kubernetes does the same with stored objects that are older than its check for leading zeros.
    """
    return re.sub(r"(?<![0-9a-fA-F:])0+(?=[0-9]+(?:\.|\Z))", "", text) if "." in text else text


def parse_address(text: str) -> IPAddress:
    """Parse an address without a prefix length. An IPv4-mapped IPv6 address becomes IPv4. Raises ValueError."""
    try:
        address = IPv6Address(text) if ":" in text else IPv4Address(text)
    except ValueError:
        raise ValueError(f'must be an IP address such as 10.0.0.1 or fd00::1; is "{text}"') from None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f'must be an IP address without a zone; is "{text}"')
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
    return address


def parse_network(text: str, *, lenient: bool = False) -> tuple[IPNetwork, bool]:
    """Parse a CIDR.

    Returns the network with host bits cleared, and whether there were host bits.
    ``lenient``: whether leading zeros in IPv4 octets are accepted.

    Raises ValueError if the text is not a CIDR.  An address without a prefix length is not a CIDR.
    """
    address, slash, length = text.partition("/")
    if lenient:
        address = _strip_zeros(address)
    if not slash:
        bits = 128 if ":" in text else 32
        try:
            parse_address(address)
        except ValueError:
            pass
        else:
            raise ValueError(f'must be a CIDR; for the single address write "{text}/{bits}"')
    if slash and length.isascii() and length.isdigit() and len(length) <= 3 and "%" not in address:  # noqa: PLR2004
        try:
            if ":" in address:
                network: IPNetwork = IPv6Network((address, int(length)), strict=False)
                return network, IPv6Address(address) != network.network_address
            network = IPv4Network((address, int(length)), strict=False)
            return network, IPv4Address(address) != network.network_address
        except ValueError:
            pass
    raise ValueError(f'must be a CIDR such as 10.0.0.0/8 or fd00::/64; is "{text}"')


_DOMAIN_LABEL = re.compile(r"[A-Za-z0-9_](?:[-A-Za-z0-9_]*[A-Za-z0-9_])?\Z")


def check_domain(text: str) -> str | None:
    """Check a domain name (SEMANTICS 6.1). One label, but not the last, may be ``*``. A trailing dot is ignored."""
    labels = text.removesuffix(".").split(".")
    usual = 'such as "example.com" or "*.example.com"'
    if text.count("*") > 1 or labels[-1] == "*":
        return f'must be a domain name {usual}: one "*" at most, and not as the last part; is "{text}"'
    if any("*" in label and label != "*" for label in labels):
        return f'must be a domain name {usual}: "*" stands for whole parts between dots; is "{text}"'
    if len(text) > MAX_NAME or any(
        label != "*" and (len(label) > MAX_LABEL or not _DOMAIN_LABEL.match(label)) for label in labels
    ):
        return f'must be a domain name {usual}; is "{text[:MAX_NAME]}"'
    return None


NAMES_ONLY_ALLOW = (
    "the addresses of a name are known only after a workload asked for it, so until then a rule that denies by name would "
    "let the traffic through"
)
"""Why a rule with names must allow."""


def normal_domain(text: str) -> str:
    """The form in which domain names are compared: lower case, no trailing dot."""
    return text.removesuffix(".").lower()


MAX_ANNOTATIONS_BYTES = 256 * 1024


def check_annotations(annotations: Mapping[str, str]) -> str | None:
    """Check annotations. Names have the syntax of label names, in upper or lower case. The total size is limited."""
    for key in annotations:
        if (message := check_label_key(key.lower())) is not None:
            return message.replace("label name", "annotation name")
    size = sum(
        len(key.encode(errors="replace")) + len(text.encode(errors="replace")) for key, text in annotations.items()
    )
    if size > MAX_ANNOTATIONS_BYTES:
        return f"must be at most {MAX_ANNOTATIONS_BYTES} bytes together, are {size}"
    return None
