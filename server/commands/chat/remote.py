"""Talk to a model of a running server, over `POST /v1/chat/completions` with a stream."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

from engine import ConfigError, Unavailable, VerbatimError
from server.commands.chat.talker import Message, Piece, Reply, Replying
from server.receipts.remote import NoRedirect, message_of

__all__ = ["RemoteTalker"]

_SECONDS: Final = 120.0
"""Of silence. A server that waits for a place in its queue sends comments meanwhile."""
_MOST_BYTES: Final = 16 << 20  # of one event, or of the list of models


class RemoteTalker:
    """A model on a server.

    Args:
        url: the server's, with or without `/v1`.
        key: the API key, if it wants one.
        model: an id; None takes the first that is ready.
        sampling: further fields of the request.

    Raises:
        ConfigError: the URL is none, or the server has no such model.
        Unavailable: the server cannot be reached.
    """

    def __init__(self, url: str, key: str | None, model: str | None, sampling: Mapping[str, Any]) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"--url must begin with http:// or https://, unlike {url!r:.100}.")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._key, self._sampling = key, dict(sampling)
        self._name, self._fingerprint = self._chosen(model)

    @property
    def name(self) -> str:
        return self._name

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def reply(self, messages: Sequence[Message], seed: int | None) -> Replying:
        body = {
            **self._sampling,
            "model": self._name,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            "logprobs": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if seed is None else {"seed": seed}),
        }
        with self._open("/v1/chat/completions", json.dumps(body).encode()) as answer:
            return (yield from _read(_events(answer, self._base)))

    def close(self) -> None:
        """Nothing is held."""

    def _chosen(self, wanted: str | None) -> tuple[str, str]:
        """Return id and fingerprint of the wanted model, or of the first that is ready."""
        with self._open("/v1/models", None) as answer:
            try:
                models = [one for one in json.loads(answer.read(_MOST_BYTES))["data"] if isinstance(one["id"], str)]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(f"{self._base} answers no list of models: it is no server of models.") from None
        if wanted is None:
            models.sort(key=lambda one: one.get("state", "ready") != "ready")  # stable: the first that is ready
        else:
            models = [one for one in models if one["id"] == wanted]
        if not models:
            raise ConfigError(f"{self._base} has no model{'' if wanted is None else f' {wanted!r:.200}'}.")
        return models[0]["id"], str(models[0].get("system_fingerprint") or "")

    def _open(self, path: str, body: bytes | None) -> IO[bytes]:
        request = urllib.request.Request(self._base + path, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            answer: IO[bytes] = urllib.request.build_opener(NoRedirect).open(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            raise VerbatimError(f"{self._base} answers {error.code}: {message_of(error)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _broken(self._base, error) from None
        return answer


def _read(events: Iterator[dict[str, Any]]) -> Replying:
    """Yield the pieces of a streamed reply and return it whole."""
    text, thoughts, finish, seed, fingerprint, count = "", "", "stop", 0, "", 0
    tokens: list[tuple[str, float]] = []
    for event in events:
        if "error" in event:
            raise Unavailable(f"the server ended the reply: {event['error'].get('message')}")
        seed, fingerprint = event.get("seed", seed), event.get("system_fingerprint") or fingerprint
        count = (event.get("usage") or {}).get("completion_tokens", count)
        for choice in event.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            tokens += [(one["token"], one["logprob"]) for one in (choice.get("logprobs") or {}).get("content") or ()]
            thought, said = (choice["delta"].get(name) or "" for name in ("reasoning_content", "content"))
            thoughts, text = thoughts + thought, text + said
            if thought:
                yield Piece(thought, thought=True)
            if said:
                yield Piece(said)
    return Reply(text, thoughts, seed, fingerprint, tuple(tokens), count, finish)


def _events(answer: IO[bytes], base: str) -> Iterator[dict[str, Any]]:
    """Yield the data of server-sent events up to `[DONE]`."""
    try:
        while line := answer.readline(_MOST_BYTES):
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue  # a comment, or the empty line between events
            if data.strip() == b"[DONE]":
                return
            event = json.loads(data)
            yield event
            if "error" in event:
                return
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise _broken(base, error) from None
    raise Unavailable(f"{base} broke the reply off.")


def _broken(base: str, error: Exception) -> Unavailable:
    reason = str(getattr(error, "reason", error)) or type(error).__name__
    return Unavailable(f"{base} cannot be asked: {reason.rstrip('.'):.200}.")
