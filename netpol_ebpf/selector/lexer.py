# SPDX-License-Identifier: Apache-2.0
"""Tokens of the selector language (SEMANTICS 2.1).

Invariants: every token has the offset of its start, in characters, so that each error can point at the token.  White
space is space and tab only.  Word operators (`in`, `not in`, `contains`, ...) are recognised only directly after a
label, so labels may have these names.  This module must not depend on the grammar or on the meaning of tokens.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

from netpol_ebpf.errors import SelectorError

MAX_LABEL_CHARS = 512
"""The longest label name that an expression may contain. Calico's parser has the same limit."""

LABEL_NAME = re.compile(r"[A-Za-z0-9_./-]+")


class TokenKind(enum.Enum):
    """The kind of a token. The value is the kind's name in error messages."""

    LABEL = "a label name"
    STRING = "a quoted string"
    HAS = "has("
    ALL = "all("
    GLOBAL = "global("
    EQ = "=="
    NE = "!="
    IN = "in"
    NOT_IN = "not in"
    CONTAINS = "contains"
    STARTS_WITH = "starts with"
    ENDS_WITH = "ends with"
    NOT = "!"
    AND = "&&"
    OR = "||"
    LPAREN = "("
    RPAREN = ")"
    LBRACE = "{"
    RBRACE = "}"
    COMMA = ","
    END = "the end of the selector"


@dataclass(frozen=True, slots=True)
class Token:
    """One token.

    ``text``: the label name, or the content of a string without its quotes.
    ``offset``: the position of the token's first character.
    """

    kind: TokenKind
    text: str
    offset: int


_BLANK = re.compile(r"[ \t]*")
# A word operator must end where a label name would end, so `a inside` does not contain the operator `in`.
_WORD_OPERATOR = re.compile(
    r"(?:(?P<IN>in)|(?P<NOT_IN>not[ \t]*in)|(?P<CONTAINS>contains)"
    r"|(?P<STARTS_WITH>starts[ \t]*with)|(?P<ENDS_WITH>ends[ \t]*with))(?![A-Za-z0-9_./-])"
)
_PUNCTUATION = {
    "==": TokenKind.EQ,
    "!=": TokenKind.NE,
    "&&": TokenKind.AND,
    "||": TokenKind.OR,
    "!": TokenKind.NOT,
    "(": TokenKind.LPAREN,
    ")": TokenKind.RPAREN,
    "{": TokenKind.LBRACE,
    "}": TokenKind.RBRACE,
    ",": TokenKind.COMMA,
}
_HALF_OPERATORS = {"=": "==", "&": "&&", "|": "||"}
_CALLS = {"has": TokenKind.HAS, "all": TokenKind.ALL, "global": TokenKind.GLOBAL}


def scan_tokens(text: str) -> Iterator[Token]:
    """All tokens of ``text``. The last token is END.

    Raises SelectorError at the first character with which no token can start, at an unterminated string, at a line
    break (also inside a string), and at a label name longer than MAX_LABEL_CHARS.
    """
    _refuse_line_breaks(text)
    position = 0
    after_label = False
    while True:
        position = _BLANK.match(text, position).end()  # type: ignore[union-attr]  # matches the empty string too
        if position == len(text):
            yield Token(TokenKind.END, "", position)
            return
        token, position = _scan_one(text, position, after_label=after_label)
        after_label = token.kind is TokenKind.LABEL
        yield token


def _refuse_line_breaks(text: str) -> None:
    for offset, character in enumerate(text):
        if character in "\n\r":
            raise SelectorError(
                "line break inside a selector",
                text=text,
                offset=offset,
                hint="Write the selector on one line; a folded YAML scalar (>-) joins lines with spaces.",
            )


def _scan_one(text: str, position: int, *, after_label: bool) -> tuple[Token, int]:
    """The token that starts at ``position``, and the offset of its end. ``text[position]`` must not be white space."""
    character = text[position]
    if character in "'\"":
        return _scan_string(text, position)
    for length in (2, 1):
        kind = _PUNCTUATION.get(text[position : position + length])
        if kind is not None:
            return Token(kind, kind.value, position), position + length
    if character in _HALF_OPERATORS:
        whole = _HALF_OPERATORS[character]
        raise SelectorError(f"{character!r} is no operator; write {whole!r}", text=text, offset=position)
    if after_label:
        word = _WORD_OPERATOR.match(text, position)
        if word is None:
            raise SelectorError(
                "expected an operator after the label name",
                text=text,
                offset=position,
                hint="Operators are ==, !=, in, not in, contains, starts with, ends with.",
            )
        kind = TokenKind[str(word.lastgroup)]
        return Token(kind, kind.value, position), word.end()
    name = LABEL_NAME.match(text, position)
    if name is None:
        raise SelectorError(f"unexpected character {character!r}", text=text, offset=position)
    end = name.end()
    if end - position > MAX_LABEL_CHARS:
        raise SelectorError(
            f"label name of {end - position} characters; at most {MAX_LABEL_CHARS} are allowed",
            text=text,
            offset=position,
        )
    call = _CALLS.get(name.group())
    if call is not None and text.startswith("(", end):
        return Token(call, call.value, position), end + 1
    return Token(TokenKind.LABEL, name.group(), position), end


def _scan_string(text: str, position: int) -> tuple[Token, int]:
    """The string literal that starts at ``position``, and the offset of its end.

    The literal ends at the next quote of the same kind (single or double).  There is no escape character.
    """
    end = text.find(text[position], position + 1)
    if end < 0:
        raise SelectorError(
            "string is not closed",
            text=text,
            offset=position,
            hint="A string ends at the next quote of the sort that opened it; there are no escapes.",
        )
    return Token(TokenKind.STRING, text[position + 1 : end], position), end + 1
