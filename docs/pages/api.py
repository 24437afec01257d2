"""The page of the API: endpoints, fields, errors."""

from __future__ import annotations

from typing import Any

from docs.pages.errors import errors, other_codes
from docs.pages.markdown import NOTE, listed, shown, table
from engine import ModelInfo, ModelStatus, ReproducibilityReport
from server.api import openapi
from server.api.chat_messages import UNSUPPORTED_MESSAGE_FIELDS
from server.api.completions.fields import COMPLETION
from server.api.fields import CHAT, BodyFields
from server.api.messages.fields import COUNT, MESSAGE
from server.api.models.objects import model_details
from server.api.responses.fields import RESPONSES
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE
from server.wire.protocol import REFUSALS


def api() -> str:
    fields = openapi.CHAT_BODY["content"]["application/json"]["schema"]["properties"]
    extensions = {name for name, field in fields.items() if field.get("description", "").startswith("Extension.")}
    return "\n".join(
        [
            NOTE + "# The API\n",
            "`POST /v1/chat/completions` and `POST /api/v1/chat/completions` are the same. Under both prefixes: "
            "`POST /completions`, `POST /responses`, `POST /messages`, `POST /messages/count_tokens`, `GET /models`, "
            "`GET /models/{id}`, `POST /models/{id}/load`, `POST /models/{id}/unload` "
            "([guide](../guides/models.md)) and, where keys are in use, `GET /usage` "
            "(`since`: a date or Unix seconds; `by`: day or model) for the key's own usage; and, at the root "
            "too, `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info` (`model`: may be left out). "
            "Beside them `GET /health`, `GET /health/live`, `GET /health/ready`, `GET /version` and the machine "
            "readable form of this page, `GET /openapi.json`. [For whoever runs the server](../guides/operation.md): "
            "`GET /machine`, `GET /keys` under both prefixes, `GET /metrics` at the root.\n",
            "Every `GET` answers `HEAD`, too, and every path `OPTIONS`, with its methods in `Allow`. Slashes at the "
            "end of a path or doubled mean nothing: `/v1/models/` is `/v1/models`, without a redirection. `/health` "
            "is `/health/ready`: 200 where every model is loaded, alive and making progress, else 503, as llama.cpp "
            "answers while it loads and vLLM when its engine is dead. A probe that restarts what fails it should ask "
            "for `/health/live`. A body may be sent with `Content-Encoding: gzip`; limits are for what is sent and "
            "for what it is decoded to. Connections speak HTTP/1.1: a wish for HTTP/2 or WebSocket (`Upgrade`) is "
            "ignored.\n",
            "## Request fields\n",
            "`null` is the same as leaving a field out. Defaults of sampling fields are those below, then the "
            "checkpoint's `generation_config.json`, then the entry's `sampling`; the last one wins.\n",
            _fields({name: field for name, field in fields.items() if name not in extensions}),
            "### Extensions\n",
            "Not in the OpenAI API; the `openai` client sends them in `extra_body`.\n",
            _fields({name: fields[name] for name in fields if name in extensions}),
            "## Fields that are refused\n",
            "Known to clients, not honoured by this build: 422 `unsupported_parameter`, with the field's name in "
            "`param`. A value that asks for what happens anyway is accepted, and so is `null`.\n",
            _refused(CHAT),
            "Likewise in a message: " + ", ".join(f"`{name}`" for name in UNSUPPORTED_MESSAGE_FIELDS) + ", the "
            "role `function`, and content parts that are not `text`.\n",
            "A field that nobody knows is ignored and named in the response header `x-ignored-fields`; with "
            "`strict_params: true` under `server:` it is a 422 `unknown_field`.\n",
            "## Plain completions\n",
            "`POST /completions` continues a prompt without a chat template.\n",
            _fields(_schemas(COMPLETION, apart=CHAT)),
            "As in chat completions: " + _alike(COMPLETION, CHAT) + ".\n",
            "Refused, as above:\n",
            _refused(COMPLETION),
            "## Responses\n",
            "`POST /responses` takes and returns items; see [the guide](../guides/responses.md).\n",
            _fields(_schemas(RESPONSES, apart=CHAT)),
            "As in chat completions: " + _alike(RESPONSES, CHAT) + ".\n",
            "Refused, as above:\n",
            _refused(RESPONSES),
            "## Messages\n",
            "`POST /messages` takes and returns what Anthropic's Messages API does ([guide](../guides/messages.md)).\n",
            _fields(_schemas(MESSAGE, apart=CHAT)),
            "As in chat completions: " + _alike(MESSAGE, CHAT) + ".\n",
            "Refused, as above:\n",
            _refused(MESSAGE),
            "`POST /messages/count_tokens` returns `input_tokens`. It takes " + listed(list(COUNT.honoured)) + ".\n",
            "## Tokens\n",
            "`POST /tokenize` returns `count`, `max_model_len`, `tokens` and `token_strs`:\n",
            _fields(_schemas(TOKENIZE)),
            "`POST /detokenize` returns `prompt`, the text, with special tokens as their names:\n",
            _fields(_schemas(DETOKENIZE)),
            "They cost nothing and count as requests.\n",
            "## Response\n",
            "As the OpenAI API: `chat.completion`, or with `stream` events of `chat.completion.chunk` and at the end "
            "`data: [DONE]`; of a plain completion `text_completion`, streamed or not; of `/responses` a `response` "
            "or its events. `system_fingerprint` names what the bits depend on, `seed` (an extension) is the one that "
            "was used, given or drawn. Every response has a header `x-request-id`: the client's own, or a fresh one.\n",
            f"`GET /models/{{id}}` of a model that was loaded has: {listed(_model_keys())}. `GET /models` lists "
            "the same "
            "without `fingerprint_parts` and `default_parts`, the named parts of which `system_fingerprint` and "
            "`defaults_fingerprint` are digests. `max_model_len` is `context_length` under the name that evaluation "
            "harnesses ask for.\n",
            "## Keys\n",
            "Where a server has keys, every path but `/health`, `/health/live`, `/health/ready` and "
            "`/receipts/key` needs one: `Authorization: Bearer KEY`. A key with limits sees what is left of its "
            "minute in `x-ratelimit-limit-requests`, `x-ratelimit-remaining-requests`, `x-ratelimit-reset-requests` "
            "(seconds, as `12s`), and the same for `tokens`.\n",
            "## Errors\n",
            'Always `{"error": {"message", "type", "param", "code"}}`, some with numbers beside them. At `/messages` '
            'it is `{"type": "error", "error": {…}, "request_id"}`, with the `type` that Anthropic has for a status.\n',
            table(("status", "code", "type", "raised as", "when"), list(errors())),
            "Before there is a request, and so before any key, with the same body; then the connection ends:\n",
            table(("status", "code", "message"), [(str(s), f"`{code}`", text) for s, code, text in REFUSALS]),
            "A 503 and a 429 carry `Retry-After`; with `x-should-retry: false` trying again does not help. Further "
            "codes: "
            + ", ".join(f"`{code}`" for code in other_codes())
            + ". An error after the first event of a stream is one `data:` event with the same body, of `/responses` "
            "one `response.failed`, and the stream ends without `[DONE]`.\n",
        ]
    )


def _schemas(fields: BodyFields, apart: BodyFields | None = None) -> dict[str, dict[str, Any]]:
    """The schemas of a body's fields, those aside that another endpoint declares alike."""
    known = apart.honoured if apart is not None else {}
    return {n: dict(field.schema) for n, field in fields.honoured.items() if known.get(n) is not field}


def _alike(fields: BodyFields, other: BodyFields) -> str:
    return ", ".join(f"`{n}`" for n, field in fields.honoured.items() if other.honoured.get(n) is field)


def _refused(fields: BodyFields) -> str:
    return table(("field", "accepted"), [(f"`{n}`", _values(v)) for n, v in sorted(fields.refused.items())])


def _fields(fields: dict[str, dict[str, Any]]) -> str:
    rows = [(f"`{n}`", _range(f), shown(f.get("default")), _description(f)) for n, f in fields.items()]
    return table(("field", "values", "default", "meaning"), rows)


def _description(field: dict[str, Any]) -> str:
    text = [str(field.get("description", "")).removeprefix("Extension. ")]
    inner = field.get("properties") or field.get("items", {}).get("properties", {})
    for name, part in inner.items():
        text.append(f"`{name}`: {_range(part)}. {_description(part)}")
    return " ".join(text).strip()


def _range(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_range(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = {"array": "list", "boolean": "true or false"}.get(field["type"], str(field["type"]))
    if "items" in field:
        kind += " of " + {"string": "strings", "integer": "integers"}.get(field["items"]["type"], "objects")
    low, high = field.get("minimum"), field.get("maximum")
    if (low, high) == (-(2**63), 2**63 - 1):
        return f"{kind}, any of 64 bits"
    if low is not None and high is not None:
        return f"{kind}, {low} … {high}"
    return kind if low is None else f"{kind}, ≥ {low}"


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(shown(value) for value in values)


def _model_keys() -> list[str]:
    info = ModelInfo(
        id="",
        created=0,
        architecture="",
        runner="packed",
        device="",
        dtype="",
        context_length=0,
        cache_tokens=0,
        max_sequences=0,
        max_requests=0,
        vocab_size=0,
        system_fingerprint="",
        law=ReproducibilityReport(True, ""),
        default_sampling={},
        weight_bytes=0,
    )
    return list(model_details(ModelStatus("", "ready", "", info)))
