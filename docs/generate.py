"""Writes docs/reference from the code: models.yaml keys, API fields, errors, commands. Run it after changing one.

    python docs/generate.py                        # all but families.md
    python docs/generate.py --templates FOLDER     # families.md too, from the chat templates (*.jinja) in a folder

The templates of the families are their publishers' and not part of this repository.

Says nothing of its own about a field: every word comes from a docstring, a range or a description in the code. A test
holds that what lies in docs/reference is what this script writes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import engine.errors
from engine import ModelConfig, ModelInfo, ModelStatus, ReproducibilityReport, VerbatimError
from engine.config import AdapterEntry
from engine.replies.chat_format import find_chat_format
from engine.replies.reasoning import EFFORTS, ReasoningFormat, template_variables
from engine.templates.chat_template import ChatTemplate
from server.api import openapi
from server.api.chat_messages import UNSUPPORTED_MESSAGE_FIELDS
from server.api.completions.fields import COMPLETION
from server.api.fields import CHAT, BodyFields
from server.api.messages.fields import COUNT, MESSAGE
from server.api.models.objects import model_details
from server.api.responses.fields import RESPONSES
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE
from server.cli import app
from server.errors import classify, headers_of
from server.settings import ReceiptSettings, ServerSettings
from server.wire.protocol import REFUSALS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
_WHEN = {
    "BadHost": "the `Host` header is missing, repeated or unreadable",
    "HostNotAllowed": "the `Host` header names neither this machine nor an entry of `hosts`",
    "OriginNotAllowed": "a page sent it whose origin is neither the server's own nor in `cors_origins`",
    "ManagementNotAllowed": "the key is no admin key or, without keys, the request is not this machine's own",
    "UnsupportedMediaType": "the `Content-Type` is not JSON",
    "UnsupportedEncoding": "the `Content-Encoding` is not gzip; `Accept-Encoding` tells what is",
    "PathNotFound": "nothing is served at this path; the message says what was meant, or what there is",
    "NotServed": "other servers have something at this path (embeddings, audio, Ollama's protocol), this one has not",
    "MethodNotAllowed": "the path does not take this method; `methods` and `Allow` name those it takes",
    "BodyTooLarge": "the body, as it is sent or decoded, is over `max_body_bytes`",
    "BodiesFull": "the bodies being read take `max_bodies_bytes`, or those of one key half of it",
    "BodyTooSlow": "the body did not arrive within `body_seconds`",
    "Unauthorized": "keys are in use, and this one is missing, unknown, revoked or expired; before the body is read",
    "UnknownKey": "the key was revoked while its request was prepared",
    "NoBalance": "the key's balance does not cover what the request may cost at most; `available`, `needed`",
    "RateLimited": "the key exceeds its requests or tokens per minute, or its concurrent requests; do not retry if one "
    "request alone exceeds the limit",
    "NoKeys": "usage was requested, and there are no keys",
    "LedgerFault": "the ledger cannot be read or written; nothing is served meanwhile",
    "Unwritable": "the ledger works, but cannot store a value of this request",
    "Locked": "the ledger works, but another process holds a lock on this key's row",
    "ReceiptNotFound": "no receipt is kept for this key under this id, or the server keeps or signs none",
    "KeepingFault": "the receipts that are kept cannot be read",
    "ReceiptError": "a receipt that was sent is none, or was altered; or a request asks for a receipt and "
    "holds what none can",
    "ModelNotFound": "no entry has this id",
    "ModelLoading": "the model is not ready yet",
    "QueueFull": "`max_sequences` + `max_queue` requests are unfinished",
    "EngineDead": "the model's engine has stopped, or the model could not be loaded",
    "RequestError": "the base class of a caller's errors",
    "Unavailable": "the base class of temporary conditions",
}
"""For classes whose name says enough in the tree that engine/errors.py draws."""
NOTE = "<!-- Written by docs/generate.py from the code. Do not edit. -->\n"


def generate() -> dict[str, str]:
    """File name in docs/reference → text."""
    return {"models-yaml.md": models_yaml(), "api.md": api(), "cli.md": cli()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--templates", type=Path, help="folder of chat templates, for families.md")
    options = parser.parse_args()
    REFERENCE.mkdir(parents=True, exist_ok=True)
    pages = generate()
    if options.templates is not None:
        pages["families.md"] = families(options.templates)
    for name, text in pages.items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/reference/{name}")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars and line ends inside cells are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]) + "\n"


# -- models.yaml -----------------------------------------------------------------------------------------------------


def models_yaml() -> str:
    return (
        f"{NOTE}# models.yaml\n\n"
        "Two keys at the top: `models`, a list of entries, and `server`, a mapping. An unknown key is an error that "
        "names the nearest known one. Relative paths are taken from the folder of the file.\n\n"
        "```yaml\nmodels:\n  - id: qwen3\n    path: /models/Qwen3-0.6B\n    context_length: 8192\n"
        "    cache_size: 2GiB\n    sampling: {temperature: 0.7}\nserver:\n  port: 9000\n```\n\n"
        "## models\n\n"
        f"An entry gives `id` and exactly one of `path`, `repo` and `builtin`.\n\n{_keys(ModelConfig)}\n"
        f"### adapters\n\nSee [LoRA adapters](../guides/adapters.md).\n\n{_keys(AdapterEntry)}\n"
        f"## server\n\n{_keys(ServerSettings)}\n"
        f"### receipts\n\nSee [Keeping receipts](../guides/keeping-receipts.md).\n\n{_keys(ReceiptSettings)}"
    )


def _keys(model: type[BaseModel]) -> str:
    said = _attribute_docstrings(model)
    hints = typing.get_type_hints(model)
    rows = [
        (f"`{name}`", _type_name(hints[name]), _default(field), said.get(name, ""))
        for name, field in model.model_fields.items()
    ]
    return table(("key", "type", "default", "meaning"), rows)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The strings that stand under a class's attributes, which Python itself does not keep."""
    [tree] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return "list, or mapping by name"
    if origin is list:
        return f"{_type_name(typing.get_args(hint)[0])}, may be repeated"
    plain: dict[Any, str] = {datetime: "date or date and time"}
    plain |= {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", dict: "mapping"}
    return plain.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    limits = "".join(
        f", {sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if hasattr(item, name)
    )
    value = field.get_default(call_default_factory=True)
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    if value == ():
        return "none"
    return ("" if value is None else f"`{shown}`") + (limits if value is not None else limits.removeprefix(", "))


# -- the API ---------------------------------------------------------------------------------------------------------


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
            "`POST /messages/count_tokens` returns `input_tokens`. It takes " + _listed(list(COUNT.honoured)) + ".\n",
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
            f"`GET /models/{{id}}` of a model that was loaded has: {_listed(_model_keys())}. `GET /models` lists "
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
            table(("status", "code", "type", "raised as", "when"), list(_errors())),
            "Before there is a request, and so before any key, with the same body; then the connection ends:\n",
            table(("status", "code", "message"), [(str(s), f"`{code}`", text) for s, code, text in REFUSALS]),
            "A 503 and a 429 carry `Retry-After`; with `x-should-retry: false` trying again does not help. Further "
            "codes: "
            + ", ".join(f"`{code}`" for code in _other_codes())
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
    rows = [(f"`{n}`", _range(f), _shown(f.get("default")), _description(f)) for n, f in fields.items()]
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
    return ", ".join(_shown(value) for value in values)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return f"`{json.dumps(value)}`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{str(value).lower()}`"


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


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _errors() -> Iterator[tuple[str, ...]]:
    """One row per error class that can reach a client, by status."""
    said = dict(re.findall(r"^[│├└─ ]*(\w+) {2,}(.+)$", engine.errors.__doc__ or "", re.MULTILINE))
    rows = []
    for cls in _subclasses(VerbatimError):
        error = cls("")
        status, kind = classify(error)
        if status == 500:
            continue
        when = _WHEN.get(cls.__name__) or said[cls.__name__]
        if "x-should-retry" in headers_of(error, 1):
            when += "; do not retry"
        rows.append((str(status), f"`{cls.code}`", f"`{kind}`", cls.__name__, when))
    yield from sorted(rows)
    yield (
        "500",
        "`internal_error`",
        "`server_error`",
        "any other exception",
        "A bug; its id stands in the log.",
    )


def _subclasses(cls: type[VerbatimError]) -> Iterator[type[VerbatimError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _other_codes() -> list[str]:
    """Codes that are given where an error is made, not by its class."""
    found = set()
    for path in (*ROOT.glob("engine/**/*.py"), *ROOT.glob("server/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(str(node.value.value))
    return sorted(found)


# -- the command line ------------------------------------------------------------------------------------------------


def cli() -> str:
    group: Any = typer.main.get_command(app)
    parts = [NOTE + "# The command line\n", f"{group.help}\n"]
    for path, command in _commands(group, "verbatim"):
        hints = typing.get_type_hints(command.callback)
        rows = [_parameter(p, hints[p.name]) for p in command.params]
        parts += [f"## {path}\n", f"{inspect.cleandoc(command.help)}\n"]
        parts.append(table(("option", "type", "default", "meaning"), rows))
    parts.append(
        "Every error that was raised on purpose is one line on standard error and exit code 1; wrong usage is "
        "exit code 2.\n"
    )
    return "\n".join(parts)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _parameter(parameter: Any, hint: Any) -> tuple[str, ...]:
    option = parameter.param_type_name == "option"
    names = ", ".join(f"`{n}`" for n in sorted([*parameter.opts, *parameter.secondary_opts], key=len, reverse=True))
    default = "required" if parameter.required else _shown(parameter.default)
    argument = parameter.metavar or parameter.name.upper()
    return (names if option else f"`{argument}`"), _type_name(hint), default, parameter.help or ""


# -- families --------------------------------------------------------------------------------------------------------


def families(folder: Path) -> str:
    """What is found out about each of the chat templates in a folder."""
    rows = []
    for path in sorted(folder.glob("*.jinja"), key=lambda p: p.name.lower()):
        template = ChatTemplate(path.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
        chat_format = find_chat_format(template)
        found = chat_format.reasoning
        rows.append(
            (
                path.stem,
                chat_format.source,
                _code(chat_format.describe()),
                f"`{found.open}` … `{found.close}`" if found else "none",
                _efforts(template, found),
            )
        )
    return (
        NOTE
        + "# Model families\n\n"
        + inspect.cleandoc(
            """
            What is found out about chat templates that people run, by rendering them. Nothing here is looked up by a
            model's name; other templates are treated alike. `verbatim models check` says the same of your models.

            *Calls from*: `chat template`: read off it. `table`: the template does not write what the model writes, so a
            small table in `engine/replies/chat_format.py` says it. `generic`: the template knows no tools; they are
            explained in a system turn, and calls are expected in the form that is shown there. A response template in
            models.yaml or in the tokenizer wins over all of these. `⏎` is the end of a line.
            """
        )
        + "\n\n"
        + table(("family", "calls from", "how a call is written", "thoughts", "reasoning_effort sets"), rows)
    )


def _code(text: str) -> str:
    """Inline code, also of a text with back-quotes."""
    return f"```` {text} ````" if "`" in text else f"`{text}`"


def _efforts(template: ChatTemplate, found: ReasoningFormat | None) -> str:
    """What each effort sets in a template; efforts that set the same stand together."""
    groups: dict[str, list[str]] = {}
    for effort in EFFORTS:
        try:
            variables = template_variables(template, found, effort)
        except VerbatimError:
            shown = "refused"
        else:
            shown = ", ".join(f"`{k}={v}`" for k, v in variables.items()) if variables else "nothing"
        groups.setdefault(shown, []).append(effort)
    if len(groups) == 1 and "nothing" in groups:
        return "nothing"
    return "; ".join(f"{', '.join(efforts)}: {shown}" for shown, efforts in groups.items())


if __name__ == "__main__":
    main()
