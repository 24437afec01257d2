"""Talk to a model that is loaded in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import ChatMessage
from server.commands.chat.talker import Message, Piece, Reply, Replying

if TYPE_CHECKING:
    from engine import LLM

__all__ = ["LocalTalker"]


class LocalTalker:
    """A model in this process. `sampling`: fields of `SamplingParams` for every reply."""

    def __init__(self, llm: LLM, sampling: Mapping[str, Any]) -> None:
        self._llm, self._sampling = llm, dict(sampling)

    @property
    def name(self) -> str:
        return self._llm.info.id

    @property
    def fingerprint(self) -> str:
        return self._llm.info.system_fingerprint

    def reply(self, messages: Sequence[Message], seed: int | None) -> Replying:
        given = {**self._sampling, "logprobs": True, **({} if seed is None else {"seed": seed})}
        prepared = self._llm.add([ChatMessage(one.role, one.content) for one in messages], **given)
        text, thoughts, finish = "", "", "stop"
        tokens: list[tuple[str, float]] = []
        ids: list[int] = []
        count = 0
        for output in self._llm.outputs(prepared.request_id):
            count = output.usage.completion_tokens
            for delta in output.deltas:
                tokens += [(entry.token, entry.logprob) for entry in delta.logprobs or ()]
                ids += delta.token_ids
                finish = delta.finish_reason or finish
                thoughts += delta.reasoning
                text += delta.text
                if delta.reasoning:
                    yield Piece(delta.reasoning, thought=True)
                if delta.text:
                    yield Piece(delta.text)
        used = prepared.params.seed
        assert used is not None, "a prepared request has its seed"
        return Reply(text, thoughts, used, self.fingerprint, tuple(tokens), count, finish, tuple(ids))

    def close(self) -> None:
        self._llm.close()
