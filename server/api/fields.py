"""The fields of request bodies, endpoint by endpoint: each is declared once, with its JSON type and its schema.

The sampling fields come from `engine.SamplingParams`, with their types, ranges, defaults and descriptions; none of them
is named here. Which fields are known, which are refused, the OpenAPI document and docs/reference/api.md follow from
these tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from engine import SAMPLING_FIELDS, SamplingField, Unsupported
from server.api.parsing import FLAG, INTEGER, LIST, OBJECT, STRING, Kind, at_most, optional, typed

MAX_NAME: Final = 256
"""Characters of a message's `name`."""
MAX_ENTRIES: Final = 16_384
"""Entries of a sampling field that is an object. A client that bans most of a vocabulary should send a grammar."""
MAX_TOOLS: Final = 128
MAX_CHOICES: Final = 1024
"""Texts of `guided_choice`."""
MAX_SALT: Final = 256
"""Characters of `cache_salt`."""
ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_JSON_TYPES: Final = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the body: the JSON types it takes, and its schema in the OpenAPI document."""

    kind: Kind
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BodyFields:
    """The fields of one endpoint's body.

    Attributes:
        honoured: by name.
        refused: fields that clients know and this build does not honour, each with the values that ask for what happens
            anyway; null always does. Any other value is refused by name, never ignored.
        required: the names of the fields that must be there.
        instead: for refused fields why, or what to send instead, where there is something to say.
    """

    honoured: Mapping[str, Field]
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def refusing_others(
        cls,
        *,
        honoured: Mapping[str, Field],
        refused: Mapping[str, tuple[Any, ...]],
        required: tuple[str, ...],
        instead: Mapping[str, str] | None = None,
    ) -> BodyFields:
        """Return the fields of an endpoint that also refuses what only others have: who sends it expects an effect."""
        return cls(honoured, {**refused, **refused_elsewhere({*honoured, *refused})}, required, instead or {})

    @property
    def known(self) -> frozenset[str]:
        """The names that are not ignored."""
        return frozenset(self.honoured) | frozenset(self.refused)

    def given(self, data: Mapping[str, Any], name: str) -> Any:
        """Return the value of a body's field, or None if it is absent or null. Checks the declared type."""
        return optional(data, name, self.honoured[name].kind)

    def sampling(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sampling fields that a body gives under the engine's names.

        Types are checked here, ranges in `engine.SamplingParams`.
        """
        found = {
            name: typed(data[name], name, declared.kind)
            for name, declared in SAMPLING.items()
            if self.honoured.get(name) is declared and data.get(name) is not None
        }
        for name, value in found.items():
            if isinstance(value, dict):
                at_most(MAX_ENTRIES, len(value), name, "entries")
        for target, names in ALIASES.items():
            for name in names:
                value = self.given(data, name) if name in self.honoured else None
                if value is not None:  # the range too, because the engine's error would not know which name was used
                    found[target] = SAMPLING_FIELDS[target].checked(name, value)
        return found

    def refuse_unsupported(self, data: Mapping[str, Any]) -> None:
        """Raise `Unsupported` for a field that this build cannot honour."""
        for name, neutral in self.refused.items():
            value = data.get(name)
            if value is not None and not any(_same(value, one) for one in neutral):
                why = f": {self.instead[name]}" if name in self.instead else ""
                raise Unsupported(f"{name} is not supported by this build{why}.", param=name)


def _same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are the same. 1 and 1.0 are, 1 and true are only in Python."""
    return isinstance(value, bool) is isinstance(other, bool) and bool(value == other)


def refused_elsewhere(own: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """Return the fields that some endpoint has, apart from an endpoint's own, as `BodyFields.refused` has them."""
    return {name: neutral for name, neutral in KNOWN.items() if name not in own}


def declare(kind: Kind, description: str = "", *, extension: bool = False, **schema: Any) -> Field:
    """Declare a field. `extension`: the OpenAI API has no such field. `schema`: what the JSON type does not say."""
    types = [{"type": _JSON_TYPES[one]} for one in kind[0]]
    base: dict[str, Any] = types[0] if len(types) == 1 else {"anyOf": types}
    said = {"description": ("Extension. " if extension else "") + description} if description else {}
    return Field(kind, {**base, **schema, **said})


def _sampling(field: SamplingField) -> Field:
    return Field((field.kind.json_types, field.kind.words), field.schema())


_TEXT_PART: Final = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
CONTENT: Final = {
    "description": "Text, or text parts that are joined as they are.",
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}],
}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": CONTENT,
        "name": {"type": "string", "maxLength": MAX_NAME, "description": "Handed to the chat template."},
        "tool_calls": {
            "type": "array",
            "items": {"type": "object"},
            "description": "An assistant's calls, as they came.",
        },
        "tool_call_id": {"type": "string", "description": "In a tool's message: the call that it answers."},
        "reasoning_content": {
            "type": "string",
            "description": "An assistant's thoughts, for templates that show earlier ones to the model.",
        },
    },
}
_FORMAT: Final = {
    "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
    "schema": {"type": "object", "description": "Extension. The schema, without a name."},
    "json_schema": {
        "type": "object",
        "required": ["schema"],
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_./-]{1,128}$"},
            "description": {"type": "string"},
            "schema": {"type": "object"},
            "strict": {"type": "boolean"},
        },
    },
}
_TOOL: Final = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
}

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_output_tokens")
}
"""Sampling fields that a body may give under several names, a later one wins."""

SAMPLING: Final[Mapping[str, Field]] = {
    name: _sampling(field) for name, field in SAMPLING_FIELDS.items() if name not in ALIASES
}
"""The sampling fields that are handed to the engine under their own names."""

MODEL: Final = declare(STRING, "An id from `GET /models`.")
MESSAGES: Final = declare(LIST, minItems=1, items=_MESSAGE)
TOOLS: Final = declare(
    LIST,
    "Functions that the model may call; read from its text, in the form that its template writes.",
    maxItems=MAX_TOOLS,
    items=_TOOL,
)
_TEMPLATE_KWARGS: Final = declare(OBJECT, "Variables of the model's chat template.", extension=True)

GOES_ON: Final[Mapping[str, Field]] = {
    "continue_final_message": declare(
        FLAG,
        "The last message, the assistant's, is the beginning of the reply, which goes on behind its last character. "
        "`content` holds what is new.",
        extension=True,
        default=False,
    ),
    "add_generation_prompt": declare(
        FLAG,
        "With the beginning of the assistant's turn. Default: true, and false with continue_final_message.",
        extension=True,
    ),
}
"""How the prompt of a conversation ends, as in vLLM and transformers."""

RECEIPT: Final[Kind] = ((bool, str), "true, false or digest")

SHARED: Final[Mapping[str, Field]] = {
    "stream": declare(FLAG, "Server-sent events instead of one body.", default=False),
    "stream_options": declare(OBJECT, properties={"include_usage": {"type": "boolean"}}),
    "response_format": declare(
        OBJECT,
        "What the answer must be, enforced while it is written. With strict, a schema that cannot be enforced whole is "
        "refused; without, the rest is checked afterwards: `schema_error` beside the choice.",
        required=["type"],
        properties=_FORMAT,
    ),
    "guided_json": declare(
        ((dict, str), "an object, or its text"),
        "A JSON schema, enforced; the object or its text.",
        extension=True,
    ),
    "guided_regex": declare(STRING, "The answer matches it whole.", extension=True, minLength=1),
    "guided_choice": declare(
        LIST,
        "The answer is one of these.",
        extension=True,
        minItems=1,
        maxItems=MAX_CHOICES,
        items={"type": "string", "minLength": 1},
    ),
    "guided_grammar": declare(STRING, "Lark, in llguidance's dialect, or GBNF.", extension=True, minLength=1),
    "structured_outputs": declare(
        OBJECT,
        "One of the forms above, as vLLM names them: json, regex, choice, grammar, or json_object: true.",
        extension=True,
        properties={
            "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
            "regex": {"type": "string", "minLength": 1},
            "choice": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            "grammar": {"type": "string", "minLength": 1},
            "json_object": {"type": "boolean"},
        },
    ),
    "json_schema": declare(
        ((dict, str), "an object, or its text"),
        "A JSON schema, as in llama.cpp and SGLang: enforced as far as it can be, the rest is checked afterwards.",
        extension=True,
    ),
    "regex": declare(STRING, "As guided_regex; SGLang's name for it.", extension=True, minLength=1),
    "grammar": declare(STRING, "As guided_grammar; llama.cpp's name for it.", extension=True, minLength=1),
    "ebnf": declare(STRING, "As guided_grammar; SGLang's name for it.", extension=True, minLength=1),
    "cache_salt": declare(
        STRING,
        "Only requests with the same salt find each other's prompts in the prefix cache.",
        extension=True,
        minLength=1,
        maxLength=MAX_SALT,
    ),
    "receipt": Field(
        RECEIPT,
        {
            "description": "Extension. A record with which the reply can be checked; `digest`: one without text. See "
            "docs/guides/keeping-receipts.md.",
            "anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["digest"]}],
            "default": False,
        },
    ),
    "user": declare(((str, int), "a string or an integer"), "For the client's own records; without effect."),
    "metadata": declare(OBJECT, "For the client's own records; without effect."),
}
"""The fields that all endpoints for completions have, beside those of sampling."""

REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "guided_whitespace_pattern": (),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
}

RECORDS: Final = frozenset((
    "user", "metadata", "safety_identifier", "client_metadata", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "cache_control",
))  # fmt: skip
"""Fields without effect wherever they are known, so that an endpoint which does not know them ignores them."""

_WITHOUT_NEUTRAL: Final = (
    "messages", "max_tokens", "max_completion_tokens", "reasoning_effort", "prediction", "audio", "web_search_options",
    "chat_template", "prompt", "suffix", "truncate_prompt_tokens", "prompt_embeds", "allowed_token_ids", "input",
    "instructions", "max_output_tokens", "max_tool_calls", "background_options", "previous_response_id",
    "conversation", "moderation", "system", "thinking", "output_format", "compaction", "thread", "container",
    "diagnostics", "fallback_credit_token", "tokens",
)  # fmt: skip
"""Of chat completions, completions, responses, messages and tokenization; the same in the next table."""

_OF_SOME: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(_WITHOUT_NEUTRAL, ()),
    **dict.fromkeys(
        (
            "continue_token_ids",
            "tools",
            "functions",
            "documents",
            "include",
            "stop_sequences",
            "mcp_servers",
            "fallbacks",
        ),
        ([],),
    ),
    **dict.fromkeys(("chat_template_kwargs", "reasoning", "output_config"), ({},)),
    **dict.fromkeys(("mm_processor_kwargs", "media_io_kwargs"), ({},)),
    **dict.fromkeys(("continue_final_message", "echo", "background", "return_token_strs"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("parallel_tool_calls", "add_generation_prompt", "spaces_between_special_tokens"), (True,)),
    "add_special_tokens": (False,),  # of a conversation: the template writes them
    "tool_choice": ("none", "auto"),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
    "response_format": ({"type": "text"},),
    "function_call": ("none",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "best_of": (1,),
    "text": ({}, {"format": {"type": "text"}}),
    "truncation": ("disabled",),
    "context_management": ([], {}, {"edits": []}),
    "speed": ("standard",),
    "inference_geo": ("global",),
}

KNOWN: Final[Mapping[str, tuple[Any, ...]]] = {
    name: neutral
    for name, neutral in {
        **{
            name: (one.schema["default"],) if "default" in one.schema else ()
            for name, one in {**SAMPLING, **SHARED}.items()
        },
        **REFUSED,
        **_OF_SOME,
    }.items()
    if name not in RECORDS
}
"""Every field that an endpoint knows, each with the values that ask for nothing where it is not honoured.

A test holds that every field of every table is here.
"""

CHAT: Final = BodyFields.refusing_others(
    honoured={
        "model": MODEL,
        "messages": MESSAGES,
        "max_completion_tokens": _sampling(SAMPLING_FIELDS["max_tokens"]),
        "max_tokens": declare(INTEGER, "The older name; max_completion_tokens wins.", minimum=-1),
        **SAMPLING,
        **SHARED,
        "tools": TOOLS,
        "tool_choice": declare(
            ((str, dict), "a string or an object"),
            'none, auto, required, the function that must be called, `{"type": "function", "function": {"name": …}}`, '
            'or those that may be, of all that the prompt shows: `{"type": "allowed_tools", "allowed_tools": {"mode": '
            '"auto" or "required", "tools": [{"type": "function", "function": {"name": …}}]}}`.',
            default="auto",
        ),
        "parallel_tool_calls": declare(FLAG, "False: the answer ends with its first call.", default=True),
        "reasoning_effort": declare(
            STRING,
            "Set in the model's chat template: none and minimal switch thinking off where there is a switch. Named in "
            "x-ignored-fields where there is none.",
            enum=["none", "minimal", "low", "medium", "high", "xhigh"],
        ),
        "prediction": declare(
            OBJECT,
            "A text that the answer may hold much of. It is tried as a draft: the answer stays the same to the bit, "
            "and comes sooner.",
            required=["type", "content"],
            properties={"type": {"const": "content"}, "content": CONTENT},
        ),
        "chat_template_kwargs": _TEMPLATE_KWARGS,
        **GOES_ON,
        "continue_token_ids": declare(
            LIST,
            "The tokens with which the reply begins, of a reply that is to go on (`return_token_ids`): with the same "
            "seed and parameters it goes on as it went. `content` holds what is new.",
            extension=True,
            items={"type": "integer", "minimum": 0},
        ),
    },
    refused={**REFUSED, "documents": ()},
    required=("model", "messages"),
)
"""`POST /chat/completions`."""
