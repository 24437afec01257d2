"""A real server whose model says what a test wants: prompts, grammars, sampling and streams are the real ones.

    python tests/clients/scripted_server.py FOLDER

FOLDER takes the checkpoint, and `requests.jsonl`, a line for each request: what came, and what became of it. The port
is the first line of the output. `POST /scripted` says what the model is to do until the next one:

    call, arguments   call this tool in a conversation that has not called it yet, then say `text`
    text              what it says; default: a value for the schema that is asked for, else "The answer is 4."
    thoughts          what it thinks before
    drawn             it draws a text that this expression describes
    free              it says what its weights say

Where a call is required, it calls the first tool that has not been called, with arguments that its schema allows. The
request's own grammar is compiled, so a request is refused as ever, and then put aside for that of the text.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
import uvicorn
from clients.instances import instance
from clients.request_log import RequestLog

from engine import Constraint, GenerationRequest, ModelConfig, PreparedRequest, Registry
from engine.grammar.answer_grammar import answer_grammar
from engine.grammar.compiler import GrammarState
from server.app import create_app
from server.run import configured
from server.settings import ServerSettings
from server.wire.connections import Connections
from server.wire.listener import bind

MODEL = "test"
CONTEXT = 131_072
"""Coding tools send tens of thousands of tokens, and ask for as many."""
DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


def checkpoint(folder: Path) -> Path:
    """Write a model of one layer with the demo model's tokenizer and template: ChatML, tools, thoughts."""
    size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    tiny_models.write(folder, "qwen3", dtype=torch.float32, vocab_size=size, max_position_embeddings=CONTEXT, **shape)
    for path in DEMO.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    return folder


class ScriptedModel:
    """Decides what the model says to a request. `script`: as `POST /scripted` gave it last."""

    def __init__(self) -> None:
        self.script: dict[str, Any] = {}

    def answer(self, request: GenerationRequest) -> Constraint | None:
        """What the model says after its thoughts, as it writes it; None: what its weights say."""
        if "drawn" in self.script:
            return Constraint("regex", self.script["drawn"])
        if self.script.get("free"):
            return None
        text = self._call(request) or self.script.get("text") or self._text(request.constraint)
        return None if text is None else Constraint("choice", [text])

    def _call(self, request: GenerationRequest) -> str | None:
        called = {call.name for message in request.messages or () for call in message.tool_calls}
        name = self._tool(request, called)
        if name is None:
            return None
        tool = next(tool for tool in request.tools if tool.name == name)
        given = self.script.get("arguments") if name == self.script.get("call") else None
        arguments = instance(dict(tool.parameters or {"type": "object"})) if given is None else given
        return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'

    def _tool(self, request: GenerationRequest, called: set[str]) -> str | None:
        choice = request.tool_choice
        if choice.kind == "function":
            return choice.name
        offered = [tool.name for tool in request.tools if tool.name not in called]
        if self.script.get("call") in offered:
            return str(self.script["call"])
        return offered[0] if choice.kind == "required" and offered else None

    @staticmethod
    def _text(constraint: Constraint | None) -> str | None:
        if constraint is None:
            return "The answer is 4."
        if constraint.kind == "json":
            return json.dumps(instance(constraint.value or {"type": "object"}))
        return str(constraint.value[0]) if constraint.kind == "choice" else None

    def scripted(
        self, prepare: Callable[[GenerationRequest], PreparedRequest], grammars: Any
    ) -> Callable[[GenerationRequest], PreparedRequest]:
        """Wrap an engine's `prepare`: what it returns is held to what the model is to say."""

        def prepared(request: GenerationRequest) -> PreparedRequest:
            made = prepare(request)
            said = self.answer(request)
            if said is None:
                return made
            thoughts = self.script.get("thoughts", "Two and two." if made.reply_format.thinking else "")
            if thoughts and said.kind == "choice":
                opened = "" if made.reply_format.thinking else "<think>"
                said = Constraint("choice", [f"{opened}\n{thoughts}\n</think>\n\n{said.value[0]}"])
            grammar = answer_grammar(grammars, said).text
            reply_format = dataclasses.replace(made.reply_format, exact_calls=True)
            return dataclasses.replace(made, grammar=grammar, reply_format=reply_format)

        return prepared


def main(folder: Path) -> None:
    """Serve until a signal arrives."""
    entry = ModelConfig(
        id=MODEL,
        path=checkpoint(folder / "checkpoint"),
        device="cpu",
        threads=1,
        max_batch_tokens=2048,
        isolation="thread",  # its preparer is replaced below
    )
    registry = Registry([entry])
    registry.start()
    registry.wait()
    engine: Any = registry.get(MODEL)
    model = ScriptedModel()
    engine.engine.prepare = model.scripted(engine.engine.prepare, engine.engine.model.grammars)
    # A text that a grammar forces comes in one piece. Here it is drawn token by token, as free text is, so that
    # clients see a stream in pieces.
    GrammarState.forced = property(lambda state: None)  # type: ignore[assignment, method-assign]
    GrammarState.all_forced = property(lambda state: ())  # type: ignore[assignment, method-assign]
    settings = ServerSettings(port=0)
    listener = bind(settings.host, settings.port)
    with (folder / "requests.jsonl").open("a") as log:
        app = RequestLog(create_app(registry, settings), log, lambda script: setattr(model, "script", script))
        server = uvicorn.Server(configured(app, settings, Connections(1024)))
        print(listener.getsockname()[1], flush=True)
        # The parent's end is this process's end, however the parent ends.
        threading.Thread(target=lambda: sys.stdin.read() or setattr(server, "should_exit", True), daemon=True).start()
        server.run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
