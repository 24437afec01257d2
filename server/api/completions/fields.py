"""The fields of a body for `POST /completions`; see `server/api/fields.py`."""

from __future__ import annotations

from typing import Any, Final

from server.api.fields import MODEL, REFUSED, SAMPLING, SHARED, BodyFields, Field, declare
from server.api.parsing import FLAG, INTEGER, STRING

MOST_PROMPTS: Final = 1024
"""Prompts of one request."""
MOST_LOGPROBS: Final = 20
DEFAULT_MAX_TOKENS: Final = 16
"""Tokens of a completion whose request names no number, as in the OpenAI API."""

_OF_CHAT: Final = frozenset(("logprobs", "top_logprobs", "thinking_budget"))
"""Sampling fields that a completion asks for otherwise, or not at all: it has no thoughts."""

_IDS: Final[dict[str, Any]] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}

COMPLETION: Final = BodyFields.refusing_others(
    honoured={
        "model": MODEL,
        "prompt": Field(
            ((str, list), "a string or a list"),
            {
                "description": "Text, token ids, or a list of either. Several prompts are several requests: their "
                "choices are numbered prompt by prompt.",
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": {"type": "string"}},
                    _IDS,
                    {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": _IDS},
                ],
            },
        ),
        "suffix": declare(
            STRING,
            "Text that comes after the completion. For models whose tokenizer has tokens for filling in the middle; "
            "the prompt must be text.",
        ),
        "echo": declare(
            FLAG, "Begin each choice with its prompt; with logprobs, those of the prompt too.", default=False
        ),
        "max_tokens": declare(
            INTEGER,
            "Cap on generated tokens; clamped to what is left of the context. 0 computes the prompt and draws nothing; "
            "-1 sets no cap.",
            minimum=-1,
            default=DEFAULT_MAX_TOKENS,
        ),
        **{name: declared for name, declared in SAMPLING.items() if name not in _OF_CHAT},
        "logprobs": declare(
            INTEGER,
            "The log-probability of each token, beside this many of the likeliest.",
            minimum=0,
            maximum=MOST_LOGPROBS,
        ),
        "best_of": declare(INTEGER, "1 or n: no more choices are drawn than returned.", minimum=1),
        **SHARED,
        "add_special_tokens": declare(
            FLAG, "Encode the text with the tokens that the tokenizer puts around one.", extension=True, default=True
        ),
    },
    refused=REFUSED,
    required=("model", "prompt"),
)
"""`POST /completions`."""
