"""What is wrong with a grammar or a schema: refuses what is too large, and names the keyword that is at fault.

llguidance says in words that a schema cannot be compiled, not where the fault is. To find it, parts of the schema are
compiled alone, within a count of characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

from llguidance import LLMatcher

from engine.errors import InvalidParameter, one_line
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.lark import json_rule
from engine.grammar.paths import check_rules, check_schema_path
from engine.text.json_schema import at, check_depth, parts
from engine.text.schema_rings import unending
from engine.types.requests import Constraint

__all__ = ["MOST_LETTERS", "check_bounds", "check_length", "enforceable", "schema_rule"]

MAX_BYTES: Final = 256 * 1024
"""Of a schema, an expression or a grammar as JSON."""
MOST_LETTERS: Final = 10_000
"""Of a `maxLength`: the lexer needs 9 states for each letter, and has 100,000 for a reply."""
_BLAMED: Final = 400  # parts of a schema that are compiled alone to find the one at fault
_RELAXED: Final = 64  # keywords that are left out of a schema one by one
_COMPILED: Final = 20_000_000  # characters of schemas that are compiled to find the fault in one

_SUBJECTS: Final = (
    # what a complaint of llguidance holds, the keywords that it may be about
    ("oneOf", ("oneOf",)), ("Unknown format", ("format",)), ("lookarounds", ("pattern", "patternProperties")),
    ("regex parse error", ("pattern", "patternProperties", *(f"{end}Length" for end in ("max", "min")))),
    ("patternProperty", ("patternProperties",)), ("min/maxProperties", ("minProperties", "maxProperties")),
    ("Invalid type", ("type",)), ("Pointer", ("$ref",)), ("Resource", ("$ref",)), ("nothing satisfies", ("$ref",)),
    ("Unsatisfiable", ("enum", "const", "pattern", "format", "minLength", "minItems", "minProperties", "anyOf")),
)  # fmt: skip
_MAY_BE_STRICT: Final = ("response_format", "text.format", "tools")
"""How the fields begin whose schemas have a flag `strict` beside them."""
_ALWAYS_STRICT: Final = ("guided_json", "structured_outputs.json")
"""Fields whose schemas have none, on endpoints that take `response_format`, too."""
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ENDLESS: Final = "nothing satisfies this reference: it demands itself for ever"


def check_bounds(constraint: Constraint) -> None:
    """Raise `InvalidParameter` for a constraint that is nested too deeply, too large, or refers along too long a path.

    The same for one with halves of characters, which no reply can hold. Nothing may look further into a constraint
    before this.
    """
    value, param = constraint.value, constraint.param
    check_length(value, param)
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InvalidParameter(f"{param} holds half a surrogate pair: {half!a}.", param=param) from None
    if constraint.kind == "json":
        check_schema_path(value, param)
    elif constraint.kind == "grammar":
        check_rules(str(value), param)


def check_length(value: Any, param: str) -> int:
    """Return how many characters the value of a field has as JSON, or as the text that it is.

    Raises:
        InvalidParameter: it is nested too deeply, too large, or no JSON.
    """
    check_depth(value, param)
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"{param} is not JSON: {one_line(str(error))[:300]}", param=param) from None
    if size > MAX_BYTES:
        raise InvalidParameter(f"{param} has {size} characters; at most {MAX_BYTES} are allowed.", param=param)
    return size


def schema_rule(compiler: GrammarCompiler, constraint: Constraint) -> tuple[str, tuple[str, ...]]:
    """Write the right side of a Lark rule for a JSON schema; return it with pointers to the unenforced keywords.

    Raises: what `enforceable` raises.
    """
    schema, dropped = enforceable(compiler, constraint)
    return json_rule(schema), dropped


def enforceable(compiler: GrammarCompiler, constraint: Constraint) -> tuple[Any, tuple[str, ...]]:
    """Return a JSON schema without the keywords that cannot be enforced, and pointers to those.

    Raises:
        InvalidParameter: it is no schema; with `strict`, it cannot be enforced whole.
    """
    return _Diagnosis(compiler, constraint.param).enforceable(constraint)


class _Diagnosis:
    """The search for the faults of one schema."""

    def __init__(self, compiler: GrammarCompiler, param: str) -> None:
        self._compiler = compiler
        self._param = param
        self._left = _COMPILED  # characters that may still be compiled

    def enforceable(self, constraint: Constraint) -> tuple[Any, tuple[str, ...]]:
        schema, dropped = _without_long({} if constraint.value is True else constraint.value)
        complaint = self._fault(schema)
        if complaint is None:
            return schema, tuple(dropped)
        if constraint.strict:
            raise self._refusal(schema, complaint)
        schema = deepcopy(schema)
        for _ in range(_RELAXED):
            if self._left <= 0:
                break
            where, keyword = self._blame(schema, complaint)
            if keyword is None:
                schema = self._emptied(schema, where)
                dropped.append(where)
            else:
                dropped += self._without(schema, where, keyword, complaint)
            complaint = self._fault(schema)
            if complaint is None:
                return schema, tuple(dropped)
        return {}, ("",)  # nothing of it is enforced; all of it is checked afterwards

    def _fault(self, schema: Any) -> str | None:
        """What is wrong with a schema; None if it can be enforced whole."""
        found = self._complaint(schema)
        return _ENDLESS if found is None and unending(schema) is not None else found

    def _complaint(self, schema: Any) -> str | None:
        """Why llguidance does not compile a schema, in its words; None if it does."""
        try:
            text = json.dumps(schema)
            self._left -= len(text)
            # A schema that is not an object is refused by llguidance beside its options.
            told = json.dumps({"allOf": [schema]}) if isinstance(schema, bool) else text
            grammar = LLMatcher.grammar_from_json_schema(told, overrides={"lenient": False})
        except ValueError as error:
            return str(error)
        return self._compiler.complaint(grammar)

    def _blame(self, schema: Any, complaint: str) -> tuple[str, str | None]:
        """Find the fault: the pointer of the part of the schema that has it, and its keyword if that is known."""
        if complaint == _ENDLESS:
            return unending(schema) or "", "$ref"
        named = re.match(r"Unimplemented keys: (\[.*\])", complaint)
        if named:
            keys = json.loads(named[1])
            for pointer, part in parts(schema):
                for key in keys:
                    if isinstance(part, Mapping) and key in part:
                        return pointer, key
        deepest = ""
        root = _definitions(schema)
        for count, (pointer, part) in enumerate(parts(schema)):
            if count == _BLAMED or self._left <= 0:
                break
            alone = {**root, **part} if isinstance(part, dict) else part
            found = self._complaint(alone) if pointer.startswith(deepest) else None
            if found and found.split(":")[0] == complaint.split(":")[0]:
                deepest = pointer
        return deepest, _keyword(at(schema, deepest), complaint)

    def _without(self, schema: Any, where: str, keyword: str, complaint: str) -> list[str]:
        """Delete a keyword at a pointer and wherever else it is at fault in the same way; return all the pointers."""
        dropped = []
        value = at(schema, where)[keyword]
        for pointer, part in list(parts(schema)):
            if not isinstance(part, dict) or keyword not in part:
                continue
            if pointer != where and not self._shared(complaint, keyword, part, value, schema):
                continue
            if keyword == "oneOf" and "anyOf" not in part:
                part["anyOf"] = part.pop("oneOf")  # at least one, instead of exactly one
            else:
                del part[keyword]
            dropped.append(f"{pointer}/{keyword}")
            if keyword == "patternProperties" and "additionalProperties" in part:
                del part["additionalProperties"]  # it would forbid the names that the expressions allow
                dropped.append(f"{pointer}/additionalProperties")
        return dropped

    def _shared(self, complaint: str, keyword: str, part: Mapping[str, Any], value: Any, schema: Any) -> bool:
        """Whether a complaint about a keyword is true of the same keyword elsewhere, with another value."""
        if complaint.startswith("Unimplemented"):
            return True
        if keyword == "pattern":
            return self._complaint({"type": "string", "pattern": part[keyword]}) is not None
        if keyword == "oneOf":
            return self._left > 0 and self._complaint({**_definitions(schema), **part}) is not None
        return keyword == "format" and bool(part[keyword] == value)

    def _emptied(self, schema: Any, where: str) -> Any:
        """Return a schema with an empty part at a pointer."""
        if not where:
            return _definitions(schema)
        above, _, step = where.rpartition("/")
        holder = at(schema, above)
        step = step.replace("~1", "/").replace("~0", "~")
        holder[int(step) if isinstance(holder, list) else step] = {}
        return schema

    def _refusal(self, schema: Any, complaint: str) -> InvalidParameter:
        where, keyword = self._blame(schema, complaint)
        pointer = f"{where}/{keyword}" if keyword else where
        return InvalidParameter(
            f"{self._param}: at {pointer or 'the root'}: {one_line(complaint)}.{_advice(self._param)}",
            param=self._param,
            code="schema_not_enforceable",
            pointer=pointer,
        )


def _advice(param: str) -> str:
    """Say how a schema that cannot be enforced whole can be sent; nothing where a field's endpoint has no such way."""
    follows = "what can be enforced is, and the rest is checked afterwards."
    if param in _ALWAYS_STRICT:
        return f" In response_format, with strict: false, {follows}"
    return f" With strict: false {follows}" if param.startswith(_MAY_BE_STRICT) else ""


def _definitions(schema: Any) -> dict[str, Any]:
    """The keywords of a schema that references lead into."""
    return {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}


def _without_long(schema: Any) -> tuple[Any, list[str]]:
    """Leave out lengths that no reply reaches before its lexer's states are used up; return pointers to them, too."""
    found = [f"{pointer}/maxLength" for pointer, part in parts(schema) if _is_long(part)]
    if found:
        schema = deepcopy(schema)
        for _, part in parts(schema):
            if _is_long(part):
                del part["maxLength"]
    return schema, found


def _is_long(part: Any) -> bool:
    most = part.get("maxLength") if isinstance(part, dict) else None
    return isinstance(most, int | float) and most > MOST_LETTERS


def _keyword(part: Any, complaint: str) -> str | None:
    """The keyword of a part that a complaint of llguidance is about; None if it tells none."""
    if not isinstance(part, Mapping):
        return None
    words: list[str] = re.findall(r"\w+", complaint.split("regex parse error")[0])
    for word in words if complaint.startswith(("Unsatisfiable", "Expected", "invalid")) else ():
        if word in part and word not in ("type", "properties", "items"):
            return word
    for text, keywords in (*_SUBJECTS, ("", _BOUNDS)):
        for keyword in keywords if text in complaint else ():
            if keyword in part:
                return keyword
    return None
