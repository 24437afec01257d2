"""`LarkWriter`: writes grammars as text, in llguidance's dialect of Lark. Knows special tokens by name; no torch.

The dialect: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine.replies.reasoning import ReasoningFormat

__all__ = ["ANY", "LarkWriter", "json_rule", "literal", "quoted"]

ANY: Final = r"/(.|\n)*/"
"""The expression for any text."""

WHITE_SPACE: Final = r"(\x20|\n\x20{0,32}|\n\t{0,8})?"
"""White space between the tokens of a JSON text: none, a space, or a line break and indentation. It has a bound, or an
uncertain model would write blanks until its limit."""


class LarkWriter:
    """Writes rules for one vocabulary, with special tokens by their ids.

    Args:
        special: ids of special tokens by their names.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special

    def delimiter(self, text: str) -> str:
        """Write a delimiter as the terms of a rule: special tokens by their ids, all else as text."""
        return self.terms(self.pieces(text))

    def terms(self, pieces: Sequence[tuple[int | None, str]]) -> str:
        """Write pieces as the terms of a rule, and adjacent texts as one term."""
        terms: list[str] = []
        text = ""
        for special, piece in [*pieces, (-1, "")]:
            if special is None:
                text += piece
                continue
            if text:
                terms.append(quoted(text))
            text = ""
            terms.append(f"<[{special}]>")
        return " ".join(terms[:-1])

    def pieces(self, text: str) -> list[tuple[int | None, str]]:
        """Split a text at the special tokens in it: (id, name) for one, (None, text) for what lies between."""
        if not self._special:
            return [(None, text)]
        names = "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True))
        return [(self._special.get(piece), piece) for piece in re.split(f"({names})", text) if piece]

    def whole(
        self,
        thoughts: ReasoningFormat | None,
        opened: bool,
        answer: str,
        rules: Sequence[str] = (),
        *,
        asides: bool = False,
    ) -> str:
        """Write a whole grammar around the rule `answer`, with thoughts before it if there may be any.

        Args:
            opened: whether the prompt ends inside the thoughts.
            asides: whether other turns of the model may precede its answer, and thoughts any number of times. Without,
                thoughts that are a turn of their own may come twice.
        """
        if thoughts is None:
            return "\n".join(["start: answer", answer, *rules])
        start = "rest" if opened else "thoughts?"
        opening = f"thoughts: {self.delimiter(thoughts.open)} rest"
        if thoughts.resume:
            opens = (thoughts.open, *(thoughts.asides if asides else ()))
            opening = f"thoughts: ({' | '.join(map(self.delimiter, opens))}) rest resume"
            opening += f"\nresume: {self.delimiter(thoughts.resume)}"
            again = "thoughts*" if asides else "thoughts? thoughts?"
            start = f"rest resume {again}" if opened else again
        return "\n".join([f"start: {start} answer", opening, self._until(thoughts.close), answer, *rules])

    def _until(self, close: str) -> str:
        """The rule `rest`: any text up to a delimiter, the delimiter, and white space."""
        (special, text), *others = self.pieces(close)
        if special is None:
            tail = self.delimiter("".join(t for _, t in others)) if others else ""
            return f"rest: free {tail} SPACE\nfree[suffix={quoted(text)}]: /(.|\\n)*/\nSPACE: /\\s{{0,4}}/"
        free = f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{literal(close)}(.|\\n)*/"  # nor its letters one by one
        return f"rest: FREE {self.delimiter(close)} SPACE\n{free}\nSPACE: /\\s{{0,4}}/"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Write the right side of a rule for a JSON schema, all of which can be enforced."""
    guidance = {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def quoted(text: str) -> str:
    """Write a text as a string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(text: str) -> str:
    """Write a text as part of an expression between slashes."""
    escaped = re.sub(r"([\\.+*?()|\[\]{}^$/#&~-])", r"\\\1", text)
    return escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
