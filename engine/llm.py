"""`LLM`: the engine for scripts. Runs the same core in the caller's own thread, without a server or an event loop."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import ModelConfig, entry_of, validate
from engine.core import EngineCore
from engine.loading.loader import load
from engine.preparation import Preparer
from engine.types.messages import ChatMessage, ToolCall
from engine.types.model_info import ModelInfo
from engine.types.outputs import FinishReason, RequestOutput, TokenLogprob, Usage
from engine.types.requests import Constraint, GenerationRequest
from engine.types.tools import AUTO, Tool, ToolChoice

Prompt = str | Sequence[ChatMessage]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice. `usage` counts all choices of its request."""

    index: int
    text: str
    """Without the thoughts."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""
    """The thoughts before the text, of a model that thinks."""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class _How:
    """What is asked of a prompt beside the sampling."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO


class LLM:
    """A model for scripts.

        llm = LLM("path/to/checkpoint")
        [answer] = llm.generate([ChatMessage("user", "Hello")], seed=7)

    A list of messages goes through the chat template; a string is continued as it is. `constraint` says what a reply
    must be: `Constraint("json", schema)`.
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
        self._open(entry, pull, progress)

    @classmethod
    def from_config(
        cls, entry: ModelConfig, *, pull: bool = False, progress: Callable[[str], None] | None = None
    ) -> LLM:
        """The model of a models.yaml entry."""
        llm = cls.__new__(cls)
        llm._open(entry, pull, progress)
        return llm

    def _open(self, entry: ModelConfig, pull: bool, progress: Callable[[str], None] | None) -> None:
        self._model = load(entry, pull=pull, progress=progress)
        self._core = EngineCore(self._model)
        self._preparer = Preparer(
            entry,
            self._model.info,
            self._model.tokenizer,
            self._model.vocabulary,
            self._model.template,
            self._model.grammars,
            self._model.chat_format,
        )
        self._ids = itertools.count()
        self._boxes: dict[str, deque[RequestOutput]] = {}  # outputs of open requests that nobody has read yet

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    def stream(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        constraint: Constraint | None = None,
        reasoning_effort: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = AUTO,
        **sampling: Any,
    ) -> Iterator[RequestOutput]:
        """Generate, step by step. Leaving the loop early frees the request's place.

        Raises:
            RequestError: before anything is generated.
        """
        how = _How(chat_template_kwargs or {}, constraint, reasoning_effort, tuple(tools), tool_choice)
        request_id, _ = self._add(prompt, how, sampling)
        return self._outputs(request_id)

    def generate(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        constraint: Constraint | None = None,
        reasoning_effort: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = AUTO,
        **sampling: Any,
    ) -> list[Completion]:
        """All choices of one prompt."""
        how = _How(chat_template_kwargs or {}, constraint, reasoning_effort, tuple(tools), tool_choice)
        return self._generate([prompt], how, sampling)[0]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        constraint: Constraint | None = None,
        reasoning_effort: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = AUTO,
        **sampling: Any,
    ) -> list[list[Completion]]:
        """Several prompts at once; the answers are the same as one by one, only sooner."""
        how = _How(chat_template_kwargs or {}, constraint, reasoning_effort, tuple(tools), tool_choice)
        return self._generate(prompts, how, sampling)

    def _generate(self, prompts: Sequence[Prompt], how: _How, sampling: dict[str, Any]) -> list[list[Completion]]:
        added = [self._add(prompt, how, sampling) for prompt in prompts]
        return [_collect(list(self._outputs(request_id)), seed) for request_id, seed in added]

    def close(self) -> None:
        """End the process in which grammars are tried; without this it ends with the object."""
        self._preparer.close()
        self._core.close()

    def _outputs(self, request_id: str) -> Iterator[RequestOutput]:
        """Step until a request has ended; what steps do for other requests waits in their own boxes."""
        try:
            while True:
                while not self._boxes[request_id]:
                    for output in self._core.step():
                        if output.request_id in self._boxes:
                            self._boxes[output.request_id].append(output)
                output = self._boxes[request_id].popleft()
                if output.error:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            self._core.abort(request_id)
            del self._boxes[request_id]

    def _add(self, prompt: Prompt, how: _How, sampling: dict[str, Any]) -> tuple[str, int]:
        text = prompt if isinstance(prompt, str) else None
        request = GenerationRequest(
            request_id=f"llm-{next(self._ids)}",
            prompt=text,
            messages=None if isinstance(prompt, str) else tuple(prompt),
            sampling=sampling,
            chat_template_kwargs=how.chat_template_kwargs,
            constraint=how.constraint,
            reasoning_effort=how.reasoning_effort,
            tools=how.tools,
            tool_choice=how.tool_choice,
        )
        prepared = self._preparer.prepare(request)
        self._core.add(prepared)
        self._boxes[prepared.request_id] = deque()
        assert prepared.params.seed is not None
        return prepared.request_id, prepared.params.seed


def _collect(outputs: list[RequestOutput], seed: int) -> list[Completion]:
    """Join the deltas of each choice."""
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
            )
        )
    return completions
