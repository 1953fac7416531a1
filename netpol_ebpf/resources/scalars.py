# SPDX-License-Identifier: Apache-2.0
"""Reads YAML scalars without quotes as kubectl and the API server read them.

They use sigs.k8s.io/yaml, which reads as Go's yaml.v2 does.  The words of YAML 1.1 are booleans (``y``, ``off``).
Numbers may have underscores and Go's prefixes (``1_000``, ``017``, ``0x1F``).  A number with a leading zero that is not
octal is decimal (``08`` is 8).  Dates and base-60 numbers are text (``1:30`` is a range of ports).  This was checked
against kubectl 1.32.

Invariant: the result depends on the text alone, and the cost is bounded.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Union

Scalar = Union[str, int, float, bool, None]

_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_MAYBE_NOT_TEXT = frozenset("0123456789+-.~nNtTfFyYoO")
_MAX_DIGITS = 400
"""The longest text that is read as a number; arbitrary, longer than any float of 64 bits."""
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_BASED = re.compile(r"[-+]?0(?:[xX][0-9a-fA-F]+|[bB][01]+|[oO]?[0-7]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_GO_FLOAT = re.compile(r"\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+(?:_[0-9]+)*)?\Z")
"""Go's float syntax for text that begins with a dot. Underscores are allowed only between two digits."""
_DIGITS_OF_SINGLE = 9
"""How many digits distinguish all floats of 32 bits."""
_LEAST_PLAIN, _FIRST_WITH_EXPONENT = -4, 6
"""The range of exponents for which Go's shortest format has no exponent. The upper bound is excluded."""


def read_plain(text: str) -> Scalar:
    """The value of a plain scalar (without quotes and tag): the boolean, number, null or text that kubectl reads."""
    if not text:
        return None
    if text[0] not in _MAYBE_NOT_TEXT:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _MAX_DIGITS:
        return text
    number = _number(text)
    return text if number is None else number


def _number(text: str) -> int | float | None:
    if text[0] == ".":
        return _finite(text.replace("_", "")) if _GO_FLOAT.match(text) else None
    if text[0] not in "0123456789+-":
        return None
    plain = text.replace("_", "")
    if _DECIMAL.match(plain):
        return int(plain)
    if _BASED.match(plain):
        digits = plain.lstrip("+-")
        if digits[1] not in "xXbBoO":
            digits = "0o" + digits[1:]
        return int(digits, 0) * (-1 if plain[0] == "-" else 1)
    return _finite(plain) if _FLOAT.match(plain) else None


def _finite(text: str) -> float | None:
    """The float for which ``text`` stands. None if 64 bits cannot represent it; then Go reads a text."""
    value = float(text)
    return value if math.isfinite(value) else None


def key_text(value: float) -> str:
    """The text that kubectl makes of a mapping's key that is a number or boolean without quotes.

    A float is first rounded to 32 bits.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _short_float(value)


def _short_float(value: float) -> str:
    """The same text as Go's FormatFloat(value, 'g', -1, 32), which sigs.k8s.io/yaml uses only for keys."""
    single = _single(value)
    if not math.isfinite(single):
        return ".nan" if math.isnan(single) else ".inf" if single > 0 else "-.inf"
    digits = next(digits for digits in range(_DIGITS_OF_SINGLE) if _single(float(f"{single:.{digits}e}")) == single)
    mantissa, _, exponent = f"{single:.{digits}e}".partition("e")
    if _LEAST_PLAIN <= int(exponent) < _FIRST_WITH_EXPONENT:
        return f"{single:.{max(digits - int(exponent), 0)}f}"
    return f"{mantissa}e{int(exponent):+03d}"


def _single(value: float) -> float:
    """The nearest float of 32 bits; infinity if ``value`` is too large."""
    try:
        (single,) = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(single)
