"""The fields of bodies for `POST /tokenize` and `POST /detokenize`; see `server/api/fields.py`."""

from __future__ import annotations

from typing import Final

from server.api.fields import GOES_ON, MESSAGES, TOOLS, BodyFields, declare
from server.api.parsing import FLAG, LIST, OBJECT, STRING

_OPTIONAL_MODEL: Final = declare(STRING, "An id from `GET /models`; may be left out where there is only one.")

TOKENIZE: Final = BodyFields(
    honoured={
        "model": _OPTIONAL_MODEL,
        "prompt": declare(STRING, "Text; either this or messages."),
        "messages": MESSAGES,
        "add_special_tokens": declare(
            FLAG, "Of a prompt: with the tokens that the tokenizer puts around a text. Default: true."
        ),
        **GOES_ON,
        "return_token_strs": declare(FLAG, "Add each token as the vocabulary spells it.", default=False),
        "tools": TOOLS,
        "chat_template_kwargs": declare(OBJECT, "Variables of the model's chat template."),
    },
    refused={
        "chat_template": (),
        "mm_processor_kwargs": (),
        "media_io_kwargs": (),
    },
)
"""`POST /tokenize`."""

DETOKENIZE: Final = BodyFields(
    honoured={"model": _OPTIONAL_MODEL, "tokens": declare(LIST, items={"type": "integer", "minimum": 0})},
    required=("tokens",),
)
"""`POST /detokenize`."""
