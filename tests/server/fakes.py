"""An engine and a registry that follow a script: they honour the interface, compute nothing, remember everything."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine import (
    ChoiceDelta,
    ContextLengthExceeded,
    EchoedPrompt,
    EngineDead,
    EngineStats,
    GenerationRequest,
    InvalidParameter,
    Lease,
    ModelInfo,
    ModelLoading,
    ModelNotFound,
    ModelStatus,
    PreparedRequest,
    QueueFull,
    ReproducibilityReport,
    RequestOutput,
    RequestStream,
    SamplingParams,
    TokenizedPrompt,
    TokenizerInfo,
    TokenLogprob,
    TopLogprob,
    Usage,
    VerbatimError,
)
from server.accounts.charging import Meter
from server.app import create_app
from server.settings import ServerSettings

VOCABULARY = 1000
CONTEXT = 64
MAX_CHOICES = 16
PROMPT_TOKENS = 5

INFO = ModelInfo(
    id="fake",
    created=1_700_000_000,
    architecture="FakeForCausalLM",
    runner="packed",
    device="cpu",
    dtype="float32",
    context_length=CONTEXT,
    cache_tokens=4096,
    max_sequences=16,
    max_requests=100,
    vocab_size=VOCABULARY,
    system_fingerprint="fp_fake",
    law=ReproducibilityReport(
        True, "alone, packed and chunked agree bit for bit.", (("packed", True), ("chunked", True))
    ),
    default_sampling={"temperature": 0.7},
    weight_bytes=1,
)
STATS = EngineStats(
    alive=True, stalled=False, waiting=0, running=0, steps=0, preemptions=0, prompt_tokens=0, cached_tokens=0,
    generated_tokens=0, blocks_total=8, blocks_free=8,
)  # fmt: skip

Step = RequestOutput | float | None
"""What a script is made of: an output, a pause in seconds, or None: nothing more comes, ever."""
Script = Callable[[PreparedRequest], Iterable[Step]]


def token(token_id: int, text: str, *, top: int = 0) -> TokenLogprob:
    """A token with a log-probability of its own."""
    rivals = tuple(TopLogprob(i, f"r{i}", f"r{i}".encode(), -float(i + 1)) for i in range(top))
    return TokenLogprob(token_id, text, text.encode(), -1.0 / (token_id + 1), rivals)


def output(
    request: PreparedRequest,
    deltas: Sequence[ChoiceDelta],
    tokens: int,
    *,
    finished: bool = False,
    error: VerbatimError | None = None,
) -> RequestOutput:
    usage = Usage(len(request.prompt_token_ids), tokens, cached_tokens=2)
    return RequestOutput(request.request_id, tuple(deltas), usage, finished, error)


def word_by_word(*words: str) -> Script:
    """Every choice says the same words, one a step; the last step also ends it."""

    def script(request: PreparedRequest) -> Iterable[Step]:
        params, n = request.params, request.params.n
        for i, word in enumerate(words):
            last = i + 1 == len(words)
            logprobs = (token(i, word, top=params.top_logprobs),) if params.logprobs else None
            margins = (None if i % 2 else i + 0.5,) if params.margins else None
            finish = "stop" if last else None
            deltas = [ChoiceDelta(c, word, (i,), logprobs, finish, margins=margins) for c in range(n)]  # type: ignore[arg-type]
            step = output(request, deltas, n * (i + 1), finished=last)
            yield step if i else dataclasses.replace(step, prompt_logprobs=prompt_logprobs(request))

    return script


def prompt_logprobs(request: PreparedRequest) -> tuple[TokenLogprob | None, ...] | None:
    """Those of a prompt, as the engine tells them: none for its first token."""
    most = request.params.prompt_logprobs
    if most is None:
        return None
    entries = (dataclasses.replace(token(i, chr(i), top=most), rank=3) for i in request.prompt_token_ids[1:])
    return (None, *entries)


HELLO = word_by_word("Hel", "lo", " wörld", "!")
SILENT: Script = lambda request: (None,)  # noqa: E731


class FakeEngine:
    """Plays `script` for every request. `open` holds the ids in place, `freed` those aborted before their end."""

    def __init__(
        self,
        script: Script = HELLO,
        *,
        info: ModelInfo = INFO,
        limit: int = 100,
        prepare_error: BaseException | None = None,
        submit_error: BaseException | None = None,
        stats: EngineStats = STATS,
    ) -> None:
        self.info = info
        self.step_bytes: dict[str, int] = {}
        self.script = script
        self.limit = limit
        self.prepare_error = prepare_error
        self.submit_error = submit_error
        self.fixed_stats = stats
        self.requests: list[GenerationRequest] = []
        self.open: dict[str, asyncio.Task[None]] = {}
        self.streams: dict[str, RequestStream] = {}
        self.freed: list[str] = []
        self.closed = False

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        await asyncio.sleep(0)
        self.requests.append(request)
        if self.prepare_error:
            raise self.prepare_error
        params = SamplingParams.merged(self.info.default_sampling, request.sampling)
        if params.n > MAX_CHOICES:
            raise InvalidParameter(f"n must be at most {MAX_CHOICES} here, not {params.n}.", param="n")
        for token_id in (*(t for t, _ in params.logit_bias), *params.stop_token_ids):
            if token_id not in range(VOCABULARY):
                raise InvalidParameter(f"{token_id} is not a token of this model.", param=f"logit_bias.{token_id}")
        words = sum(len((m.content or "").split()) for m in request.messages or ())
        if words >= CONTEXT:
            raise ContextLengthExceeded(
                f"the prompt has {words} tokens; this model's context holds {CONTEXT}.",
                param="messages",
                prompt_tokens=words,
                context_length=CONTEXT,
            )
        limit = CONTEXT + PROMPT_TOKENS if request.context_limit is None else request.context_limit
        if limit <= PROMPT_TOKENS:
            raise ContextLengthExceeded(
                f"the prompt has {PROMPT_TOKENS} tokens; this caller's context holds {limit}, one of them "
                "for the answer.",
                param="messages",
                prompt_tokens=PROMPT_TOKENS,
                context_length=limit,
            )
        most = min(CONTEXT, limit - PROMPT_TOKENS)
        seed = 77 if params.seed is None else params.seed
        params = dataclasses.replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most), seed=seed)
        ids, echo = tuple(range(PROMPT_TOKENS)), None
        if request.messages is None:
            ids = self._ids(request)
            if not ids:
                raise InvalidParameter("the prompt holds no token.", param=request.prompt_field)
            shown = tuple(chr(i) for i in ids)
            echo = EchoedPrompt("".join(shown), shown, tuple(range(len(ids)))) if request.echo else None
        return PreparedRequest(request_id=request.request_id, prompt_token_ids=ids, params=params, echo=echo)

    @staticmethod
    def _ids(request: GenerationRequest) -> tuple[int, ...]:
        """A token for each character, whose code is its id."""
        if request.prompt is not None:
            return tuple(ord(c) % VOCABULARY for c in request.prompt)
        ids = request.prompt_token_ids or ()
        for token_id in ids:
            if token_id not in range(VOCABULARY):
                raise InvalidParameter(f"{token_id} is not a token of this model.", param=request.prompt_field)
        return ids

    async def tokenize(self, request: GenerationRequest) -> TokenizedPrompt:
        self.requests.append(request)
        ids = tuple(range(PROMPT_TOKENS)) if request.messages is not None else self._ids(request)
        return TokenizedPrompt(ids, tuple(chr(i) for i in ids))

    async def detokenize(self, tokens: Sequence[int], group: str = "") -> str:
        for i, token_id in enumerate(tokens):
            if token_id not in range(VOCABULARY):
                raise InvalidParameter(f"{token_id} is not a token of this model.", param=f"tokens.{i}")
        return "".join(chr(i) for i in tokens)

    async def tokenizer(self) -> TokenizerInfo:
        return TokenizerInfo(
            tokenizer_class="FakeTokenizer",
            bos_token=None,
            eos_token="<end>",
            pad_token=None,
            unk_token=None,
            vocab_size=VOCABULARY,
            adds_special_tokens=False,
            chat_template=None,
            fill_in_the_middle=False,
        )

    def submit(self, prepared: PreparedRequest) -> RequestStream:
        if self.submit_error:
            raise self.submit_error
        if len(self.open) >= self.limit:
            raise QueueFull(f"{len(self.open)} requests are running or waiting.", limit=self.limit)
        stream = RequestStream(prepared.request_id)
        self.streams[prepared.request_id] = stream
        self.open[prepared.request_id] = asyncio.ensure_future(self._play(prepared, stream))
        return stream

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"

    def abort(self, request_id: str) -> None:
        task = self.open.pop(request_id, None)
        if task:
            task.cancel()
            self.freed.append(request_id)
            self.streams.pop(request_id).end()

    def stats(self) -> EngineStats:
        return self.fixed_stats

    def close(self) -> None:
        self.closed = True

    async def _play(self, prepared: PreparedRequest, stream: RequestStream) -> None:
        for step in self.script(prepared):
            if step is None:
                return
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            await asyncio.sleep(0)
            stream.deliver(step)
            if step.finished:
                self.open.pop(prepared.request_id, None)
                self.streams.pop(prepared.request_id, None)


class FakeRegistry:
    """Entries by id: an engine, or the status of one that is not there."""

    def __init__(self, *entries: FakeEngine | ModelStatus) -> None:
        self.entries = {(e.info.id if isinstance(e, FakeEngine) else e.id): e for e in entries}
        self.closed = False
        self.leased: Counter[str] = Counter()

    def get(self, model_id: str) -> FakeEngine:
        entry = self.entries.get(model_id)
        if entry is None:
            raise ModelNotFound(f"the model {model_id!r} does not exist; there is: fake.", param="model")
        if isinstance(entry, FakeEngine):
            return entry
        if entry.state == "failed":
            raise EngineDead(f"{model_id} could not be loaded: {entry.detail}")
        raise ModelLoading(f"{model_id} is loading ({entry.detail}).")

    async def acquire(self, model_id: str) -> Lease:
        engine: Any = self.get(model_id)
        self.leased[model_id] += 1
        return Lease(engine, lambda: self.leased.subtract([model_id]))

    def list(self) -> list[ModelStatus]:
        return [
            ModelStatus(e.info.id, "ready", "ready", e.info) if isinstance(e, FakeEngine) else e
            for e in self.entries.values()
        ]

    def close(self) -> None:
        self.closed = True


def make_app(*entries: FakeEngine | ModelStatus, meter: Meter | None = None, **settings: Any) -> Any:
    """The application over fakes; without entries, over one engine that says hello."""
    registry: Any = FakeRegistry(*(entries or (FakeEngine(),)))
    return create_app(registry, ServerSettings(**settings), meter)


def complete(**fields: Any) -> dict[str, Any]:
    """A good body for a completion of plain text, with these fields on top."""
    return {"model": "fake", "prompt": "abc", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    """A good body, with these fields on top."""
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], **fields}
