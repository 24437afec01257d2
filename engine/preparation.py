"""From what a caller wants to what the engine runs: template, tokens, defaults, limits.

Everything that can be refused is refused here, before anything is queued. Knows the tokenizer and the model's limits;
computes nothing with the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from engine.chat_template import ChatTemplate
from engine.config import ModelConfig
from engine.detokenizer import Vocabulary
from engine.dialect import Dialect
from engine.errors import ContextLengthExceeded, InvalidFormat, InvalidParameter, TemplateRefused, Unsupported
from engine.grammar import GrammarCompiler
from engine.reasoning import ReasoningFormat, template_variables
from engine.tool_format import CALL_ID, generic_messages, one_call_a_turn, with_written_calls
from engine.tool_grammar import ToolGrammar, tool_grammar
from engine.types import ChatMessage, GenerationRequest, ModelInfo, PreparedRequest, SamplingParams

_DRAWN_SEED_BITS = 53
"""A seed that the engine draws survives a client whose numbers are doubles."""


class Preparer:
    """Turns requests for one model into prepared ones."""

    def __init__(
        self,
        config: ModelConfig,
        info: ModelInfo,
        tokenizer: Any,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        grammars: GrammarCompiler,
        dialect: Dialect,
    ) -> None:
        self._config = config
        self._info = info
        self._tokenizer = tokenizer
        self._template = template
        self._grammars = grammars
        self._dialect = dialect
        self._reasoning = dialect.reasoning
        invalid = set(vocabulary.invalid_ids(info.vocab_size))
        self._token_ids = frozenset(range(info.vocab_size)) - invalid

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check, render, tokenise.

        Raises:
            InvalidFormat, TemplateRefused, ContextLengthExceeded: see their codes.
            InvalidParameter: a sampling field out of range, `n` over the cap, an id outside the vocabulary.
        """
        params = SamplingParams.merged(self._info.default_sampling, request.sampling)
        if params.n > self._config.max_choices:
            raise InvalidParameter(f"n must be at most {self._config.max_choices} here, not {params.n}.", param="n")
        self._check_ids(params)
        if params.thinking_budget is not None and self._reasoning is None:
            raise Unsupported("thinking_budget: this model does not think.", param="thinking_budget")
        variables, ignored = self._variables(request)
        text = self._text(request, variables)
        tokens = self._tokens(request, text)
        found = self._reasoning
        thinks = found is not None and text is not None and text.rstrip().endswith(found.open)
        may_think = found if request.messages is not None else None
        if text is not None and found is not None and text.rstrip().endswith(found.close):
            may_think = None  # the template has closed the thoughts before they began
        grammar = self._grammar(request, may_think, thinks)
        return PreparedRequest(
            request_id=request.request_id,
            prompt_token_ids=tokens,
            params=self._complete(params, len(tokens)),
            grammar=grammar.text if grammar else None,
            unenforced_schema=request.constraint.value
            if request.constraint and grammar and grammar.unenforced
            else None,
            unenforced_tools=grammar.loose if grammar else frozenset(),
            calls_first=bool(request.tools and request.constraint and request.tool_choice == "auto"),
            chat=request.messages is not None,
            thinks=thinks,
            opening=self._opening(text),
            ignored=ignored,
            group=request.group,
            cache_share=("" if self._config.share_prefix_cache else request.group, request.cache_salt),
            tools=request.tools,
            parallel_tool_calls=request.parallel_tool_calls,
        )

    def _grammar(
        self, request: GenerationRequest, thoughts: ReasoningFormat | None, opened: bool
    ) -> ToolGrammar | None:
        """What the reply is held to.

        With tools: calls, if some are asked for; calls or the form that is asked for; strict calls, once they begin.
        """
        choice, tools, form = request.tool_choice, request.tools, request.constraint
        if not tools:
            return ToolGrammar(*self._grammars.grammar_of(form, thoughts, opened)) if form else None
        if choice == "auto" and form is None and not any(tool["function"].get("strict") for tool in tools):
            return None
        written = self._dialect.tool_format
        if written is None:
            raise Unsupported(
                "tool_choice: how this model writes calls is known from its response template alone, which can be read "
                "but not written; only none, and auto without strict functions or a form, can be honoured.",
                param="tool_choice",
            )
        if form is not None and choice != "auto":
            self._grammars.grammar_of(form)  # it can never come to it, but what is wrong is said
        grammar = tool_grammar(
            self._grammars,
            written,
            tools,
            thoughts,
            opened,
            free=choice == "auto" and form is None,
            several=request.parallel_tool_calls and not choice.startswith(":"),
            only=choice[1:] if choice.startswith(":") else None,
            otherwise=form if choice == "auto" else None,
        )
        self._grammars.check(grammar.text, "tools")
        return grammar

    def _variables(self, request: GenerationRequest) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The template's variables, and whether an effort was asked for that they cannot express."""
        given = dict(request.chat_template_kwargs)
        for key in given:
            if not isinstance(key, str):
                raise InvalidFormat(f"chat_template_kwargs: {key!r} is not a name.", param="chat_template_kwargs")
        if request.reasoning_effort is None:
            return given, ()
        chosen = template_variables(self._template.serving(request.tools), self._reasoning, request.reasoning_effort)
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

    def _text(self, request: GenerationRequest, variables: dict[str, Any]) -> str | None:
        """The rendered prompt, if there are messages."""
        if request.messages is None:
            return None
        if not request.messages:
            raise InvalidParameter("messages must hold at least one message.", param="messages")
        messages: Sequence[ChatMessage] = request.messages
        tools = [_as_shown(tool) for tool in request.tools]
        # A template of its own for tools leaves the other one to conversations that know of none.
        if self._dialect.shows_tools and (request.tools or self._template.tool_use is None):
            form = self._dialect.template_format
            if form is not None and CALL_ID in form.close:
                messages = [_with_short_ids(message) for message in messages]
            if form is not None and form.between is None:
                messages = one_call_a_turn(messages)
            if form is not None and not self._dialect.writes_calls:
                messages = with_written_calls(messages, form)
            return self._template.render(messages, variables, tools=tools)
        if not request.tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return self._template.render(messages, variables)
        try:
            return self._template.render(generic_messages(messages, tools, system=True), variables)
        except TemplateRefused:  # it may know no system turn
            return self._template.render(generic_messages(messages, tools, system=False), variables)

    def _opening(self, text: str | None) -> str:
        read_by = self._dialect.response_template
        return read_by.opening(text) if read_by is not None and text is not None else ""

    def _tokens(self, request: GenerationRequest, text: str | None) -> tuple[int, ...]:
        given = [n for n in ("messages", "prompt", "prompt_token_ids") if getattr(request, n) is not None]
        if len(given) != 1:
            raise InvalidFormat(f"give exactly one of messages, prompt and prompt_token_ids, not {given or 'none'}.")
        if request.prompt_token_ids is not None:
            for token in request.prompt_token_ids:
                self._check_id(token, "prompt_token_ids", "prompt_token_ids")
            tokens = tuple(request.prompt_token_ids)
        elif request.prompt is not None:
            tokens = self._encode(request.prompt, special=True, param="prompt")
        else:
            assert text is not None
            tokens = self._encode(text, special=False, param="messages")
        limit = self._info.context_length
        if not tokens:
            raise InvalidParameter("the prompt holds no token.", param=given[0])
        if len(tokens) >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens)} tokens; this model's context holds {limit}, one of them for the answer.",
                param=given[0],
                prompt_tokens=len(tokens),
                context_length=limit,
            )
        return tokens

    def _encode(self, text: str, *, special: bool, param: str) -> tuple[int, ...]:
        try:
            # A rendered template writes its own special tokens; a bare prompt gets what the tokenizer adds.
            ids = self._tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        except (UnicodeEncodeError, TypeError):
            raise InvalidFormat(f"{param} holds text that is not valid Unicode.", param=param) from None
        found: tuple[int, ...] = tuple(ids["input_ids"])
        if max(found, default=0) >= self._info.vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(max(found))
            raise InvalidParameter(
                f"{param} holds {token!r}, a token that this model does not read as text.", param=param
            )
        return found

    def _complete(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """Fill in what the request left open: how long, and from which seed."""
        room = self._info.context_length - prompt_tokens
        caps = (room, params.max_tokens, self._config.max_completion_tokens)
        max_tokens = min(cap for cap in caps if cap is not None)
        seed = secrets.randbits(_DRAWN_SEED_BITS) if params.seed is None else params.seed
        return dataclasses.replace(
            params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens), seed=seed
        )


def _as_shown(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A definition as the model sees it: how strictly it is held to it is no concern of its."""
    return {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}


def _with_short_ids(message: ChatMessage) -> ChatMessage:
    """A message whose call ids have nine letters and digits, for templates that show them and take no other length."""

    def short(call_id: str) -> str:
        own = call_id.removeprefix("call_")
        return own if len(own) == 9 and own.isalnum() else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    return dataclasses.replace(
        message,
        tool_calls=tuple(dataclasses.replace(call, id=short(call.id)) for call in message.tool_calls),
        tool_call_id=None if message.tool_call_id is None else short(message.tool_call_id),
    )
