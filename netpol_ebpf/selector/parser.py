# SPDX-License-Identifier: Apache-2.0
"""Parses the text of a selector to a `Selector`, by recursive descent over the grammar of SEMANTICS 2.2.

Invariant: text outside the grammar is rejected, with the offset of the error; nothing is skipped or guessed.  The
operator ``!`` has the highest precedence and applies to one primary; AND comes next, then OR.  Evaluation and canonical
text are in `tree`.
"""

from __future__ import annotations

from collections.abc import Callable

from netpol_ebpf.errors import SelectorError
from netpol_ebpf.selector.expression import Selector
from netpol_ebpf.selector.lexer import Token, TokenKind, scan_tokens
from netpol_ebpf.selector.tree import (
    All,
    And,
    Contains,
    EndsWith,
    Equals,
    Global,
    Has,
    In,
    NotEquals,
    NotIn,
    Or,
    SelectorNode,
    StartsWith,
    negated,
)

MAX_DEPTH = 64
"""Deepest nesting of parentheses; arbitrary.

It is far beyond what people write, and far below Python's recursion limit.
"""

_COMPARISONS: dict[TokenKind, Callable[[str, str], SelectorNode]] = {
    TokenKind.EQ: Equals,
    TokenKind.NE: NotEquals,
    TokenKind.CONTAINS: Contains,
    TokenKind.STARTS_WITH: StartsWith,
    TokenKind.ENDS_WITH: EndsWith,
}
_MEMBERSHIPS: dict[TokenKind, Callable[[str, tuple[str, ...]], SelectorNode]] = {
    TokenKind.IN: In,
    TokenKind.NOT_IN: NotIn,
}


def parse(text: str) -> Selector:
    """Parse ``text`` to a selector. Empty or blank text is ``all()``.

    Raises SelectorError with the offset of the first character that the grammar does not allow.
    """
    parser = _Parser(text)
    return Selector(parser.selector())


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        # Tokens are scanned on demand, so that the first error in the text is reported, in a token or in the grammar.
        self._tokens = scan_tokens(text)
        self._ahead: Token | None = None
        self._depth = 0

    def selector(self) -> SelectorNode:
        """Grammar: selector = [ or ]."""
        if self._peek().kind is TokenKind.END:
            return All()
        node = self._or()
        self._expect(TokenKind.END)
        return node

    def _or(self) -> SelectorNode:
        """Grammar: or = and , { "||" , and }."""
        operands = [self._and()]
        while self._accept(TokenKind.OR):
            operands.append(self._and())
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _and(self) -> SelectorNode:
        """Grammar: and = unary , { "&&" , unary }."""
        operands = [self._unary()]
        while self._accept(TokenKind.AND):
            operands.append(self._unary())
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _unary(self) -> SelectorNode:
        """Grammar: unary = { "!" } , primary."""
        negate = False
        while self._accept(TokenKind.NOT):
            negate = not negate
        primary = self._primary()
        return negated(primary) if negate else primary

    def _primary(self) -> SelectorNode:
        token = self._take()
        if token.kind is TokenKind.HAS:
            label = self._expect(TokenKind.LABEL)
            self._expect(TokenKind.RPAREN)
            return Has(label.text)
        if token.kind is TokenKind.ALL:
            self._expect(TokenKind.RPAREN)
            return All()
        if token.kind is TokenKind.GLOBAL:
            self._expect(TokenKind.RPAREN)
            return Global()
        if token.kind is TokenKind.LABEL:
            return self._comparison(token)
        if token.kind is TokenKind.LPAREN:
            return self._group(token)
        raise self._unexpected(token, "a label name, has(...), all(), global(), '!' or '('")

    def _group(self, opening: Token) -> SelectorNode:
        """Parse the rest of a primary in parentheses, after the parenthesis ``opening``."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SelectorError(f"parentheses nested deeper than {MAX_DEPTH}", text=self._text, offset=opening.offset)
        node = self._or()
        self._expect(TokenKind.RPAREN)
        self._depth -= 1
        return node

    def _comparison(self, label: Token) -> SelectorNode:
        operator = self._take()
        comparison = _COMPARISONS.get(operator.kind)
        if comparison is not None:
            return comparison(label.text, self._expect(TokenKind.STRING).text)
        membership = _MEMBERSHIPS.get(operator.kind)
        if membership is not None:
            return membership(label.text, self._set())
        if operator.kind is TokenKind.LPAREN and label.text in {"has", "all", "global"}:
            raise SelectorError(
                f"{label.text}( must be written without a space before the parenthesis",
                text=self._text,
                offset=operator.offset,
            )
        raise self._unexpected(operator, f"an operator after the label name {label.text}")

    def _set(self) -> tuple[str, ...]:
        """Grammar: set = "{" [ string { "," string } [ "," ] ] "}". A set may be empty, and may end in a comma."""
        self._expect(TokenKind.LBRACE)
        values: list[str] = []
        while self._peek().kind is TokenKind.STRING:
            values.append(self._take().text)
            if not self._accept(TokenKind.COMMA):
                break
        self._expect(TokenKind.RBRACE)
        return tuple(values)

    def _peek(self) -> Token:
        if self._ahead is None:
            self._ahead = next(self._tokens)
        return self._ahead

    def _take(self) -> Token:
        token = self._peek()
        if token.kind is not TokenKind.END:
            self._ahead = None
        return token

    def _accept(self, kind: TokenKind) -> bool:
        if self._peek().kind is not kind:
            return False
        self._ahead = None
        return True

    def _expect(self, kind: TokenKind) -> Token:
        token = self._take()
        if token.kind is not kind:
            raise self._unexpected(token, kind.value if kind in _NAMED else f"'{kind.value}'")
        return token

    def _unexpected(self, token: Token, wanted: str) -> SelectorError:
        seen = token.kind.value if token.kind in _NAMED else f"'{token.kind.value}'"
        return SelectorError(f"expected {wanted}, found {seen}", text=self._text, offset=token.offset)


_NAMED = frozenset({TokenKind.LABEL, TokenKind.STRING, TokenKind.END})
"""Token kinds that error messages describe by name, not by their text."""
