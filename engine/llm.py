"""`LLM`: the engine for scripts. Steps in the caller's own thread, without a server or an event loop."""

from __future__ import annotations

import datetime as dt
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig, entry_of, validate
from engine.engine import Engine
from engine.loading.loader import load
from engine.receipts.receipt import Receipt
from engine.receipts.recorder import Recorder, recorded
from engine.types.messages import ChatMessage, ToolCall
from engine.types.model_info import ModelInfo
from engine.types.outputs import FinishReason, RequestOutput, TokenLogprob, Usage
from engine.types.requests import Constraint, GenerationRequest, PreparedRequest
from engine.types.tools import AUTO, Tool, ToolChoice

Prompt = str | Sequence[ChatMessage]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice. `usage` is that of the whole request."""

    index: int
    text: str
    """Without the thoughts."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""
    """The thoughts before the text, if the model thinks."""
    tool_calls: tuple[ToolCall, ...] = ()
    receipt: Receipt | None = None
    """That of the whole request, if one was asked for. `check_receipt` checks it."""


class LLM:
    """A model for scripts.

        llm = LLM("path/to/checkpoint")
        [answer] = llm.generate([ChatMessage("user", "Hello")], seed=7)

    A list of messages goes through the chat template; a string is continued as it is. `constraint` says what a reply
    must be: `Constraint("json", schema)`.

    Attributes:
        engine: the engine that is stepped. A script may step it itself (`engine.add`, `engine.step`). The outputs of
            those steps are the script's, and `outputs` does not see them.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        pull: bool = False,
        progress: Callable[[str], None] | None = None,
        **config: Any,
    ) -> None:
        """`model`: a folder, a GGUF file, or a hub id that is in the local cache.

        `config`: further keys of a models.yaml entry.

        Raises:
            ConfigError, LoadError: see their messages.
        """
        entry = validate(ModelConfig, {**entry_of(str(model), "LLM"), **config}, str(model))
        self._open(Engine(load(entry, pull=pull, progress=progress)))

    @classmethod
    def from_config(
        cls, entry: ModelConfig, *, pull: bool = False, progress: Callable[[str], None] | None = None
    ) -> LLM:
        """The model of a models.yaml entry."""
        llm = cls.__new__(cls)
        llm._open(Engine(load(entry, pull=pull, progress=progress)))
        return llm

    def _open(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()
        self._boxes: dict[str, deque[RequestOutput]] = {}  # outputs of open requests that nobody has read yet

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def request(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        constraint: Constraint | None = None,
        reasoning_effort: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = AUTO,
        continue_final_message: bool = False,
        continue_token_ids: Sequence[int] | None = None,
        adapter: str = "",
        **sampling: Any,
    ) -> GenerationRequest:
        """A request under an id of its own, for `engine.prepare`. `sampling`: fields of `SamplingParams`.

        `adapter`: the name of one of the entry's adapters, to be computed beside the model.
        """
        return GenerationRequest(
            request_id=f"llm-{next(self._ids)}",
            prompt=prompt if isinstance(prompt, str) else None,
            messages=None if isinstance(prompt, str) else tuple(prompt),
            sampling=sampling,
            chat_template_kwargs=chat_template_kwargs or {},
            constraint=constraint,
            reasoning_effort=reasoning_effort,
            tools=tuple(tools),
            tool_choice=tool_choice,
            continue_final_message=continue_final_message,
            continue_token_ids=None if continue_token_ids is None else tuple(continue_token_ids),
            adapter=adapter,
        )

    def add(self, prompt: Prompt, **fields: Any) -> PreparedRequest:
        """Queue a request, which shares its steps with others; `outputs` reads it. `fields`: as in `request`.

        Raises:
            RequestError: it is refused.
        """
        return self._queue(self.engine.prepare(self.request(prompt, **fields)))

    def _queue(self, prepared: PreparedRequest) -> PreparedRequest:
        self.engine.add(prepared)
        self._boxes[prepared.request_id] = deque()
        return prepared

    def outputs(self, request_id: str) -> Iterator[RequestOutput]:
        """Step until an added request has ended. What the steps do for other requests is kept for their own readers.

        Leaving the loop early frees the request's place.

        Raises:
            VerbatimError: what ended the request, if it was not its end.
            RuntimeError: `engine` was stepped or told to abort by somebody else, who has its outputs.
        """
        try:
            while True:
                while not self._boxes[request_id]:
                    if not self.engine.has_work:
                        raise RuntimeError(f"{request_id} has ended in steps that were taken elsewhere")
                    for output in self.engine.step():
                        if output.request_id in self._boxes:
                            self._boxes[output.request_id].append(output)
                output = self._boxes[request_id].popleft()
                if output.error:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            self.engine.abort(request_id)
            del self._boxes[request_id]

    def stream(self, prompt: Prompt, **fields: Any) -> Iterator[RequestOutput]:
        """Generate, step by step. Leaving the loop early frees the request's place. `fields`: as in `request`.

        Raises:
            RequestError: before anything is generated.
        """
        return self.outputs(self.add(prompt, **fields).request_id)

    def generate(self, prompt: Prompt, *, receipt: bool = False, **fields: Any) -> list[Completion]:
        """All choices of one prompt, with a receipt if one is asked for. `fields`: as in `request`."""
        return self.generate_many([prompt], receipt=receipt, **fields)[0]

    def generate_many(
        self, prompts: Sequence[Prompt], *, receipt: bool = False, **fields: Any
    ) -> list[list[Completion]]:
        """All choices of several prompts, which share the steps. The answers are the same as one by one, only sooner.

        `receipt`: whether each prompt's completions come with a receipt. `fields`: as in `request`.
        """
        if receipt:
            return self._recorded_many([self.request(prompt, **fields) for prompt in prompts])
        added = [self.add(prompt, **fields) for prompt in prompts]
        return [join_outputs(list(self.outputs(r.request_id)), r.params.seed or 0) for r in added]

    def _recorded_many(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        now = dt.datetime.now()
        added = []
        for plain in requests:
            info = self.info.with_adapter(plain.adapter)
            request = recorded(plain, info, now)
            prepared = self.engine.prepare(request)
            recorder = Recorder(request, prepared, info, id=f"llm-{uuid.uuid4().hex}", created=int(now.timestamp()))
            added.append((self._queue(prepared), recorder))
        found = []
        for prepared, recorder in added:
            outputs = list(self.outputs(prepared.request_id))
            for output in outputs:
                recorder.add(output)
            found.append(join_outputs(outputs, prepared.params.seed or 0, recorder.receipt()))
        return found

    def token_text(self, token_id: int) -> str:
        """Return a token as text, or as `bytes:…` if it is no complete text by itself."""
        return self.engine.model.vocabulary.token_text(token_id)

    def close(self) -> None:
        """End the process in which grammars are tried; without this it ends with the object."""
        self.engine.close()


def join_outputs(outputs: Sequence[RequestOutput], seed: int, receipt: Receipt | None = None) -> list[Completion]:
    """Join the outputs of one request into its finished choices. `seed`: the one that it was prepared with."""
    usage = outputs[-1].usage
    deltas = [delta for output in outputs for delta in output.deltas]
    completions = []
    for index in sorted({d.index for d in deltas}):
        mine = [d for d in deltas if d.index == index]
        logprobs = None if mine[0].logprobs is None else tuple(e for d in mine for e in d.logprobs or ())
        finish = mine[-1].finish_reason
        assert finish is not None
        completions.append(
            Completion(
                index,
                "".join(d.text for d in mine),
                tuple(t for d in mine for t in d.token_ids),
                finish,
                seed,
                usage,
                logprobs,
                "".join(d.reasoning for d in mine),
                tuple(call for d in mine for call in d.tool_calls),
                receipt,
            )
        )
    return completions
