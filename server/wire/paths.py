"""Answers requests for paths that do not exist, or for methods that a path does not take. Knows no model.

A client with a wrong base URL, and one that speaks another server's protocol, are told what would be right: for
programs written for other servers this is the first answer they get here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, compile_path

from server.errors import MethodNotAllowed, NotServed, PathNotFound, error_response

__all__ = ["Paths", "install_paths"]

_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_SHOWN: Final = 200
"""Characters of a path that a message repeats."""
_LISTED: Final = 60
"""Paths that a message lists."""

_CHAT: Final = "/v1/chat/completions"
_NO_EMBEDDINGS: Final = ("this server computes no embeddings; its models write text", "")
_ONLY_TEXT: Final = ("this server takes and writes text only", "")
_STATELESS: Final = "this server stores no files, batches or conversations"
_BATCH: Final = (_STATELESS, "the command verbatim batch answers a file of requests")
_STORED: Final = (_STATELESS, _CHAT)
_OLLAMA: Final = "this is a path of Ollama's own protocol"
_LLAMA: Final = "this is a path of llama.cpp's own protocol"
_OTHER: Final = "this is a path of another server's own protocol"

Reasons = dict[str, tuple[str, str]]
"""What follows the prefix → why there is nothing, and what to use, or an empty text."""

_OF_OPENAI: Final[Reasons] = {
    "embeddings": _NO_EMBEDDINGS,
    "rerank": ("this server ranks no documents; its models write text", ""),
    "score": ("this server compares no texts", "/v1/completions with echo and logprobs tells a text's probability"),
    "pooling": _NO_EMBEDDINGS,
    "classify": ("this server has no classifiers", f"{_CHAT} with guided_choice chooses a label"),
    "audio": _ONLY_TEXT,
    "images": _ONLY_TEXT,
    "videos": _ONLY_TEXT,
    "realtime": _ONLY_TEXT,
    "moderations": ("this server has no models for moderation", ""),
    "files": _BATCH,
    "uploads": _BATCH,
    "batches": _BATCH,
    "assistants": _STORED,
    "threads": _STORED,
    "conversations": _STORED,
    "vector_stores": _STORED,
    "fine_tuning": ("this server trains no models", ""),
    "edits": ("edits are not served", _CHAT),
    "complete": ("this older path of Anthropic's is not served", _CHAT),
}
"""Under any prefix, or none, with everything below it: what OpenAI's API has, and other servers have beside it."""
_AT_THE_ROOT: Final[Reasons] = {
    "completion": (_LLAMA, "/v1/completions"),
    "infill": (_LLAMA, "/v1/completions with suffix"),
    "embedding": _NO_EMBEDDINGS,
    "props": (_LLAMA, "/v1/models"),
    "slots": (_LLAMA, "/health/ready"),
    "apply-template": (_LLAMA, "/tokenize with messages"),
    "generate": (_OTHER, f"{_CHAT} or /v1/completions"),
    "generate_stream": (_OTHER, f"{_CHAT} with stream"),
    "embed": _NO_EMBEDDINGS,
    "info": (_OTHER, "/v1/models"),
    "get_model_info": (_OTHER, "/v1/models"),
    "ping": (_OTHER, "/health"),
    "healthz": (_OTHER, "/health"),
}
_BELOW_API: Final[Reasons] = {
    "chat": (_OLLAMA, _CHAT),
    "generate": (_OLLAMA, f"{_CHAT} or /v1/completions"),
    "tags": (_OLLAMA, "/v1/models"),
    "show": (_OLLAMA, "/v1/models/{model_id}"),
    "ps": (_OLLAMA, "/health/ready"),
    "version": (_OLLAMA, "/version"),
    "pull": (_OLLAMA, "models are named in models.yaml"),
    "create": (_OLLAMA, "models are named in models.yaml"),
    "embed": _NO_EMBEDDINGS,
    "embeddings": _NO_EMBEDDINGS,
}


class Paths:
    """The paths that an application serves, as its routers spell them.

    Args:
        prefixes: those under which the same routes are served; the last one is the one that messages name.
    """

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._prefix = prefixes[-1]
        self._all: dict[str, None] = {}
        self._routes: list[tuple[re.Pattern[str], int, frozenset[str]]] = []  # pattern, segments, methods

    def add(self, router: APIRouter, prefix: str = "") -> None:
        """Note the routes of a router that is included under a prefix."""
        self._all |= {prefix + path: None for path in _spelled(router.routes)}
        for route in router.routes:
            if path := getattr(route, "path", None):
                methods = frozenset(getattr(route, "methods", None) or ())
                self._routes.append((compile_path(prefix + path)[0], path.count("/"), methods))

    def methods(self, path: str) -> list[str]:
        """Return the methods that a path takes.

        Of the routes that match it those with most segments count: `/models/{id}/load` and not `/models/{id}`, whose id
        may hold slashes.
        """
        found = [(segments, methods) for pattern, segments, methods in self._routes if pattern.match(path)]
        most = max((segments for segments, _ in found), default=0)
        taken = {method for segments, methods in found if segments == most for method in methods}
        return _with_ours(method for method in _METHODS if method in taken)

    @property
    def spelled(self) -> tuple[str, ...]:
        """Every path, with its prefix."""
        return tuple(self._all)

    def fault(self, path: str) -> PathNotFound | NotServed:
        """Return the refusal of a path that is not served."""
        nothing = f"There is nothing at {path[:_SHOWN]}"
        if found := self._reason(path):  # first: `threads/t/messages` is no path of a client with another base URL
            why, instead = found
            return NotServed(f"{nothing}: {why}." + (f" Instead: {instead}." if instead else ""))
        if meant := self._with_another_base(path):
            return PathNotFound(f"{nothing}; {meant}")
        near = difflib.get_close_matches(path[:_SHOWN], self._all, n=1, cutoff=0.8)
        meant = f"; did you mean {near[0]}?" if near else "."
        return PathNotFound(f"{nothing}{meant} There are: {', '.join(self._listed())}.")

    def _listed(self) -> list[str]:
        """Every path once: those under other prefixes are left out, and the prefixes are named."""
        others = [one for one in self._prefixes if one != self._prefix]
        shown = [path for path in self._all if not path.startswith(tuple(f"{one}/" for one in others))]
        shown = shown if len(shown) <= _LISTED else [*shown[:_LISTED], "…"]
        return [*shown, *(f"and those of {self._prefix} under {one}, too" for one in others)]

    def _with_another_base(self, path: str) -> str:
        """Say how a client's base URL should end if the end of the path is served under a prefix; else an empty text.

        So it is told to a client whose base URL lacks the prefix, has it twice, or holds the whole endpoint.
        """
        tails = [one.removeprefix(self._prefix) for one in self._all if one.startswith(f"{self._prefix}/")]
        for tail in sorted(tails, key=len, reverse=True):
            found = re.fullmatch("(.*)" + re.sub(r"\\{.*?\\}", "[^/]+", re.escape(tail)), path)
            if found is None:
                continue
            before, meant = found[1], self._prefix + path[found.end(1) :]
            if any(before.endswith(one + other) for one in self._prefixes for other in self._prefixes):
                return (
                    f"{meant[:_SHOWN]} was meant: leave {self._prefix} out of the client's base URL, it is there twice."
                )
            ended = f"ended in {before[:_SHOWN]}" if before else "had no path"
            return f"{meant[:_SHOWN]} was meant: let the client's base URL end in {self._prefix}. This one {ended}."
        return ""

    def _reason(self, path: str) -> tuple[str, str] | None:
        """Return why there is nothing at a path that other servers have, and what to use."""
        for prefix in (*self._prefixes, "/api", ""):
            if path.startswith(f"{prefix}/"):
                rest = path.removeprefix(f"{prefix}/")
                own: Reasons = {"/api": _BELOW_API, "": _AT_THE_ROOT}.get(prefix, {})
                return own.get(rest) or _OF_OPENAI.get(rest.partition("/")[0])
        return None


def install_paths(app: FastAPI, paths: Paths, retry_after: int) -> None:
    """Make an application answer 404 and 405 with what would be right, and `OPTIONS` with the methods of a path."""

    async def missing(request: Request, error: Exception) -> Response:
        if request.method == "OPTIONS" and request.scope["path"] == "*":  # the server as a whole
            return Response(status_code=204, headers={"allow": ", ".join(_with_ours(_METHODS))})
        return error_response(paths.fault(request.scope["path"]), request.scope, retry_after)

    async def not_allowed(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        methods = paths.methods(path)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": ", ".join(methods)})
        refused = f"{path[:_SHOWN]} takes {', '.join(methods)}, not {request.method[:20]}."
        return error_response(MethodNotAllowed(refused, methods=methods), request.scope, retry_after)

    app.add_exception_handler(404, missing)
    app.add_exception_handler(405, not_allowed)


def _spelled(routes: Iterable[BaseRoute]) -> list[str]:
    return [str(route.path).replace(":path}", "}") for route in routes if hasattr(route, "path")]


def _with_ours(methods: Iterable[str]) -> list[str]:
    """Add the methods that every path takes: `HEAD` wherever `GET`, and `OPTIONS`."""
    return [more for method in methods for more in ((method, "HEAD") if method == "GET" else (method,))] + ["OPTIONS"]
