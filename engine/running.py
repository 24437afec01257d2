"""`RunningRequest`: one request in the engine, with its choices and what is known of its prompt. Steps nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.choice import Choice
from engine.sampling.answers import Described
from engine.text.vocabulary import Vocabulary
from engine.types.outputs import ChoiceDelta, RequestOutput, TokenLogprob, TopLogprob, Usage
from engine.types.requests import PreparedRequest

__all__ = ["PromptLogprobs", "RunningRequest"]


class PromptLogprobs:
    """Collects the log-probabilities of a prompt's tokens, in order, until they are told once."""

    def __init__(self, vocabulary: Vocabulary, prompt: tuple[int, ...]) -> None:
        self._vocabulary = vocabulary
        self._entries: list[TokenLogprob | None] | None = [None]  # nothing is before the first token
        self._last_text = prompt[0] if vocabulary.is_text(prompt[0]) else None

    def add(self, found: Described) -> None:
        """Take the next token, and its alternatives, with the bytes that each adds to the text before it."""

        def told(token: int) -> tuple[int, str, bytes]:
            data = words.contribution(token, previous)
            return token, words.token_text(token, data), data

        assert self._entries is not None
        words, previous = self._vocabulary, self._last_text
        top = tuple(TopLogprob(*told(token), value) for token, value in found.top)
        self._entries.append(TokenLogprob(*told(found.token_id), found.logprob, top, found.rank))
        if words.is_text(found.token_id):
            self._last_text = found.token_id

    def take(self) -> tuple[TokenLogprob | None, ...] | None:
        """Return all entries; None if they were returned before."""
        entries, self._entries = self._entries, None
        return None if entries is None else tuple(entries)


@dataclass(slots=True)
class RunningRequest:
    """One request in the engine. Owns its choices.

    Attributes:
        unfinished: choices that have not ended.
        prompt_logprobs: those of its prompt's tokens, if they were asked for.
        prompt_tokens: of the prompt, how far it was computed at most, what the cache held included.
    """

    request: PreparedRequest
    choices: list[Choice]
    unfinished: int
    prompt_logprobs: PromptLogprobs | None = None
    prompt_tokens: int = field(default=0)

    def usage(self) -> Usage:
        """Count what was computed: once a token was drawn, the whole prompt; before that, as far as it was computed."""
        completion = sum(choice.sequence.generated for choice in self.choices)
        prompt = len(self.request.prompt_token_ids) if completion else self.prompt_tokens
        predictions = [choice.prediction for choice in self.choices if choice.prediction is not None]
        accepted = sum(prediction.accepted for prediction in predictions)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=min(self.choices[0].sequence.num_cached, prompt),
            reasoning_tokens=sum(choice.generated_thoughts for choice in self.choices),
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=len(self.request.prediction) * len(predictions) - accepted,
        )

    def output(self, deltas: list[ChoiceDelta]) -> RequestOutput:
        """Return what a step has added. The first output of a request tells its prompt's log-probabilities."""
        if self.request.params.max_tokens == 0:
            deltas = [ChoiceDelta(index, "", (), finish_reason="length") for index in range(len(self.choices))]
        return RequestOutput(
            self.request.request_id,
            tuple(deltas),
            self.usage(),
            finished=self.unfinished == 0,
            prompt_logprobs=self.prompt_logprobs.take() if self.prompt_logprobs else None,
        )
