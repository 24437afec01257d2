"""Turn a request into what the engine runs: render the template, encode tokens, fill in defaults, check limits.

Everything that can be refused is refused here, before anything is queued. Knows the tokenizer and the model's limits;
computes nothing with the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import ContextLengthExceeded, InvalidFormat, InvalidParameter, Unsupported, panics_caught
from engine.grammar.answer_grammar import ReplyGrammar
from engine.grammar.reply_grammar import GrammarSource
from engine.grammar.request_schemas import read_schemas
from engine.grammar.trial import GrammarTrial
from engine.model import LoadedModel
from engine.prompts.chat_prompt import ChatPrompts, control_words
from engine.prompts.content_guard import ControlWords
from engine.prompts.going_on import message_to_continue
from engine.prompts.plain_prompt import PlainPrompts
from engine.prompts.prompt_encoder import CHARACTERS_PER_TOKEN, PromptEncoder
from engine.prompts.text_limit import TextLimit
from engine.replies.reasoning import ReasoningFormat, template_variables
from engine.types.messages import ChatMessage
from engine.types.model_info import TokenizerInfo
from engine.types.reply_format import ReplyFormat
from engine.types.requests import EchoedPrompt, GenerationRequest, PreparedRequest, TokenizedPrompt
from engine.types.sampling_params import SamplingParams
from engine.types.tools import check_tools

_DRAWN_SEED_BITS = 53
"""Bits of a seed that the engine draws: few enough for clients whose numbers are doubles."""

_MOST_SCORES: Final = 1 << 19
"""Log-probabilities of one prompt, alternatives included. Each takes some 200 bytes until it is sent."""

_MOST_LOGITS: Final = 1 << 27
"""Logits of one pass where a prompt cannot be cut into chunks: 512 MiB."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A request's tokens, their text if it has messages (with marks, see `Encoded`), and which fields were ignored.

    Attributes:
        field: the name under which errors speak of the prompt.
        begun: the tokens with which the reply begins; `tokens` and `text` are without them.
    """

    tokens: tuple[int, ...]
    text: str | None
    mark: str
    ignored: tuple[str, ...]
    field: str
    echo: EchoedPrompt | None = None
    begun: tuple[int, ...] = ()

    @property
    def whole(self) -> tuple[int, ...]:
        """The tokens behind which something is generated."""
        return self.tokens + self.begun


class Preparer:
    """Turns requests for one model into prepared ones."""

    def __init__(self, model: LoadedModel) -> None:
        self._config = model.config
        self._info = model.info
        self._tokenizer = model.tokenizer
        self._template = model.template
        self._vocabulary = model.vocabulary
        self._trial = GrammarTrial(model.grammars)
        self._chat_format = model.chat_format
        self._reasoning = model.chat_format.reasoning
        words, kept = control_words(model.tokenizer, model.template, model.chat_format)
        self._encoder = PromptEncoder(model.tokenizer, words)
        split = model.config.content_special_tokens == "split"
        control = ControlWords(words, kept) if split else None
        self._chat = ChatPrompts(model.template, model.chat_format, self._encoder, control)
        self._limit = TextLimit(self._encoder, model.info.context_length)
        self._grammars = model.grammars
        self._plain = PlainPrompts(model.tokenizer, model.vocabulary, self._encoder, words)
        invalid = set(model.vocabulary.invalid_ids(model.info.vocab_size))
        self._token_ids = frozenset(range(model.info.vocab_size)) - invalid

    def warm(self) -> None:
        """Prepare the process in which grammars are tried, so that the first one need not wait."""
        self._trial.warm()

    def close(self) -> None:
        """End the process in which grammars are tried."""
        self._trial.close()

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check, render and encode a request.

        Raises:
            InvalidFormat, TemplateRefused, ContextLengthExceeded: see their codes.
            InvalidParameter: a sampling field out of range, `n` over the cap, an id outside the vocabulary.
            ModelNotFound: there is no such adapter.
            RuntimeError: a library in Rust panicked.
        """
        self._info.with_adapter(request.adapter)
        with panics_caught():
            return self._prepare(request)

    def tokenize(self, request: GenerationRequest) -> TokenizedPrompt:
        """Render and encode a request's prompt as `prepare` does, whether or not it fits into the context.

        Raises:
            InvalidFormat, InvalidParameter, TemplateRefused: as `prepare`.
            ContextLengthExceeded: a text so long that it is not even counted; see `_reading`.
            RuntimeError: a library in Rust panicked.
        """
        with panics_caught():
            check_tools(request.tools, request.tool_choice)
            tokens = self._prompt(request).whole
            return TokenizedPrompt(tokens, tuple(self._tokenizer.convert_ids_to_tokens(list(tokens))))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, special tokens as their names.

        Raises:
            InvalidParameter: an id outside the vocabulary.
            RuntimeError: a library in Rust panicked.
        """
        with panics_caught():
            for i, token in enumerate(tokens):
                self._check_id(token, f"tokens.{i}", f"tokens.{i}")
            return self._plain.decode(tokens)

    def tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer."""
        tokenizer = self._tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        named = {name: str(token) if (token := getattr(tokenizer, name, None)) else None for name in names}
        around = self._encoder.encode("a", special=True) != self._encoder.encode("a", special=False)
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=self._info.vocab_size,
            adds_special_tokens=around,
            chat_template=self._template.source,
            fill_in_the_middle=self._plain.fills_in,
            **named,
        )

    def _prepare(self, request: GenerationRequest) -> PreparedRequest:
        params = SamplingParams.merged(self._info.default_sampling, request.sampling)
        if params.n > self._config.max_choices:
            raise InvalidParameter(f"n must be at most {self._config.max_choices} here, not {params.n}.", param="n")
        self._check_ids(params)
        check_tools(request.tools, request.tool_choice)
        schemas = read_schemas(request.constraint, request.tools)
        if params.thinking_budget is not None and self._reasoning is None:
            raise Unsupported("thinking_budget: this model does not think.", param="thinking_budget")
        prompt = self._prompt(request)
        tokens, text = prompt.whole, prompt.text
        self._check_tokens(tokens, prompt.field, request.context_limit)
        self._check_scored(params.prompt_logprobs, len(tokens))
        if request.suffix is not None:
            ends = tuple(sorted({*params.stop_token_ids, *self._plain.fill_in_ends}))
            params = dataclasses.replace(params, stop_token_ids=ends)
        found = self._reasoning
        thinks = found is not None and text is not None and text.rstrip().endswith(found.open)
        may_think = found if request.messages is not None else None
        if text is not None and found is not None and text.rstrip().endswith(found.close):
            may_think = None  # the template has closed the thoughts before they began
        # The template was told the schemas as they came; from here on they are as they were read.
        request = dataclasses.replace(request, constraint=schemas.constraint, tools=schemas.tools)
        grammar = self._grammar(request, may_think, thinks)
        params = self._complete(params, len(tokens), request.context_limit)
        return PreparedRequest(
            request_id=request.request_id,
            prompt_token_ids=tokens,
            params=params,
            begun=len(prompt.begun),
            begun_param="continue_final_message" if request.continue_final_message else "continue_token_ids",
            grammar=grammar.text if grammar else None,
            grammar_param="tools" if request.tools or not request.constraint else request.constraint.param,
            reply_format=self._reply_format(request, prompt, grammar, thinks),
            ignored=prompt.ignored,
            left_out=(*(grammar.left_out if grammar else ()), *schemas.left_out),
            group=request.group,
            echo=prompt.echo,
            prediction=self._prediction(request.prediction, params.max_tokens or 0),
            cache_share=(
                "" if self._config.share_prefix_cache else request.group,
                request.cache_salt,
                request.adapter,
            ),
            record=request.record,
            adapter=request.adapter,
        )

    def _reply_format(
        self, request: GenerationRequest, prompt: _Prompt, grammar: ReplyGrammar | None, thinking: bool
    ) -> ReplyFormat:
        """Decide how the reply is read, from the request, its prompt and the grammar it is held to."""
        constraint, auto = request.constraint, request.tool_choice.kind == "auto"
        previous = None if request.messages is not None else self._plain.last_text(prompt.tokens)
        free = thinking or (request.tools and constraint is None and auto)  # any text may come first
        if previous is None and grammar is not None and not free:
            previous = self._vocabulary.middle
        return ReplyFormat(
            chat=request.messages is not None,
            thinking=thinking,
            opening=self._opening(prompt),
            previous=previous,
            tools=request.tools,
            parallel_tool_calls=request.parallel_tool_calls,
            exact_calls=grammar is not None,
            calls_or_answer=bool(request.tools and constraint and auto),
            unenforced_schema=constraint.value if constraint and grammar and grammar.unenforced else None,
            unenforced_tools=grammar.unenforced_tools if grammar else frozenset(),
        )

    def _grammar(
        self, request: GenerationRequest, thoughts: ReasoningFormat | None, opened: bool
    ) -> ReplyGrammar | None:
        """Compile the grammar that the reply must satisfy; None for free text."""
        choice, tools, form, written = request.tool_choice, request.tools, request.constraint, None
        free = choice.kind == "auto" and not choice.allowed and form is None
        if tools and free and not any(tool.strict for tool in tools):
            return None
        if not tools and form is None:
            return None
        if tools:
            written = self._chat_format.tool_format
            if written is None:
                raise Unsupported(
                    "tool_choice: how this model writes calls is known from its response template alone, which can be "
                    "read but not written; only none, and auto without strict functions, a list of allowed ones or a "
                    "form, can be honoured.",
                    param="tool_choice",
                )
        several = request.parallel_tool_calls
        return self._trial.grammar(GrammarSource(form, tools, written, choice, several, thoughts, opened))

    def _variables(self, request: GenerationRequest) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return the template's variables, and the fields that they cannot express (`reasoning_effort`)."""
        given = dict(request.chat_template_kwargs)
        for key in given:
            if not isinstance(key, str):
                raise InvalidFormat(f"chat_template_kwargs: {key!r} is not a name.", param="chat_template_kwargs")
        if request.reasoning_effort is None:
            return given, ()
        chosen = template_variables(
            self._template.serving(tools=bool(request.tools)), self._reasoning, request.reasoning_effort
        )
        return {**(chosen or {}), **given}, () if chosen else ("reasoning_effort",)

    def _check_ids(self, params: SamplingParams) -> None:
        for token, _ in params.logit_bias:
            self._check_id(token, "logit_bias", f"logit_bias.{token}")
        for token in params.stop_token_ids:
            self._check_id(token, "stop_token_ids", "stop_token_ids")

    def _check_id(self, token: int, name: str, param: str) -> None:
        if token not in self._token_ids:
            raise InvalidParameter(
                f"{name}: {token} is not a token of this model; its ids go from 0 to {max(self._token_ids)}.",
                param=param,
            )

    def _prompt(self, request: GenerationRequest) -> _Prompt:
        given = [n for n in ("messages", "prompt", "prompt_token_ids") if getattr(request, n) is not None]
        if len(given) != 1:
            raise InvalidFormat(f"give exactly one of messages, prompt and prompt_token_ids, not {given or 'none'}.")
        if request.continue_final_message and request.continue_token_ids is not None:
            raise InvalidParameter(
                "continue_token_ids cannot be combined with continue_final_message: leave the last message out.",
                param="continue_token_ids",
            )
        variables, ignored = self._variables(request)
        field = request.prompt_field or given[0]
        if request.continue_final_message:
            prompt = self._chat_prompt(request, variables, ignored, field, message_to_continue(request))
        elif request.messages is not None:
            prompt = self._chat_prompt(request, variables, ignored, field)
        else:
            prompt = self._plain_prompt(request, ignored, field)
        if request.continue_token_ids is None:
            return prompt
        for i, token in enumerate(request.continue_token_ids):
            self._check_id(token, f"continue_token_ids.{i}", f"continue_token_ids.{i}")
        return dataclasses.replace(prompt, begun=request.continue_token_ids)

    def _chat_prompt(
        self,
        request: GenerationRequest,
        variables: Mapping[str, Any],
        ignored: tuple[str, ...],
        field: str,
        last: ChatMessage | None = None,
    ) -> _Prompt:
        """Render and encode messages. `last`: the message that is the beginning of the reply."""
        messages = request.messages or ()
        if not messages:
            raise InvalidParameter("messages must hold at least one message.", param="messages")
        if last is not None:
            request = dataclasses.replace(request, messages=messages[:-1], add_generation_prompt=True)
        conversation = self._chat.conversation(request, variables)
        rendered = self._chat.render(conversation)
        with self._limit.reading(rendered, field):
            encoded = self._chat.encode(conversation, rendered)
        prompt = _Prompt(tuple(encoded.ids), encoded.shown, encoded.mark, ignored, field)
        if last is None:
            return prompt
        beginning = self._chat.beginning(request.tools, last, encoded, f"messages.{len(messages) - 1}")
        with self._limit.reading(rendered + beginning.text, field):
            begun = self._chat.encode_beginning(conversation, rendered, encoded.ids, beginning, self._grammars)
        return dataclasses.replace(prompt, begun=tuple(begun))

    def _plain_prompt(self, request: GenerationRequest, ignored: tuple[str, ...], field: str) -> _Prompt:
        if request.suffix is not None and request.prompt is None:
            raise InvalidParameter("suffix needs a prompt that is text.", param="suffix")
        if request.prompt is not None:
            special = request.add_special_tokens
            with self._limit.reading(suffix := request.suffix or "", "suffix"):
                suffix.encode()  # so that half a character is told of the suffix, and not of the prompt
            with self._limit.reading(request.prompt, field):
                ids, echo = self._plain.encode(
                    request.prompt, request.suffix, special=special, echo=request.echo, field=field
                )
            return _Prompt(tuple(ids), None, "", ignored, field, echo)
        tokens = tuple(request.prompt_token_ids or ())
        for token in tokens:
            self._check_id(token, field, field)
        return _Prompt(tokens, None, "", ignored, field, self._plain.echo(tokens) if request.echo else None)

    def _prediction(self, text: str | None, max_tokens: int) -> tuple[int, ...]:
        """Encode a prediction as text, no more of it than a reply can hold."""
        if not text or not max_tokens:
            return ()
        try:
            ids = self._encoder.encode_as_text(text[: max_tokens * CHARACTERS_PER_TOKEN], "prediction")
        except (UnicodeEncodeError, TypeError):
            raise InvalidFormat("prediction holds text that is not valid Unicode.", param="prediction") from None
        # A token that the model has no row for can never be drawn, and must not be computed.
        return tuple(itertools.takewhile(lambda token: token < self._info.vocab_size, ids[:max_tokens]))

    def _check_scored(self, alternatives: int | None, tokens: int) -> None:
        """Refuse log-probabilities of a prompt that would take too much memory."""
        if alternatives is None:
            return
        most = _MOST_SCORES // (alternatives + 1)
        if self._info.runner == "fallback":  # which computes a prompt in one piece
            most = min(most, _MOST_LOGITS // self._info.vocab_size)
        if tokens > most:
            raise InvalidParameter(
                f"prompt_logprobs: with {alternatives} alternatives this model scores prompts of up to {most} tokens, "
                f"not {tokens}.",
                param="prompt_logprobs",
            )

    def _check_tokens(self, tokens: Sequence[int], param: str, context_limit: int | None) -> None:
        if not tokens:
            raise InvalidParameter("the prompt holds no token.", param=param)
        if max(tokens) >= self._info.vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(max(tokens))
            raise InvalidParameter(
                f"{param} holds {token!r}, a token that this model does not read as text.", param=param
            )
        for limit, whose in ((self._info.context_length, "this model's"), (context_limit, "this caller's")):
            if limit is not None and len(tokens) >= limit:
                raise ContextLengthExceeded(
                    f"the prompt has {len(tokens)} tokens; {whose} context holds {limit}, one of them for the answer.",
                    param=param,
                    prompt_tokens=len(tokens),
                    context_length=limit,
                )

    def _opening(self, prompt: _Prompt) -> str:
        read_by = self._chat_format.response_template
        found = read_by.opening(prompt.text) if read_by is not None and prompt.text is not None else ""
        return found.replace(prompt.mark, "") if prompt.mark else found

    def _complete(self, params: SamplingParams, prompt_tokens: int, context_limit: int | None) -> SamplingParams:
        """Fill in the length and the seed if the request left them out. Clamp the length to the context."""
        contexts = (self._info.context_length, context_limit)
        room = min(limit for limit in contexts if limit is not None) - prompt_tokens
        caps = (room, params.max_tokens, self._config.max_completion_tokens)
        max_tokens = min(cap for cap in caps if cap is not None)
        seed = secrets.randbits(_DRAWN_SEED_BITS) if params.seed is None else params.seed
        return dataclasses.replace(
            params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens), seed=seed
        )
