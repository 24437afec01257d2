"""Lines of batches, and what they are answered with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.app import create_app
from server.batch.answering import Batch
from server.batch.input import InputFile
from server.batch.run import basis
from server.settings import ServerSettings

Lines = list[dict[str, Any]]


def line(custom_id: Any, text: str = "Hello", **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: Any, prompt: Any, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "tiny", "prompt": prompt, **body},
    }


def many(count: int = 24) -> Lines:
    """Requests of several kinds: drawn and greedy, long and short, with several choices, with log-probabilities."""
    kinds: Lines = [
        {},
        {"temperature": 0, "max_tokens": 12},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"seed": 5, "top_p": 0.8},
        {"messages": [{"role": "user", "content": "a long prompt " * 5}], "return_token_ids": True},
    ]
    return [line(f"row {i}", "Hello" if i % 2 else f"Say {i}", **kinds[i % len(kinds)]) for i in range(count)]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(data) + "\n" for data in lines), encoding="utf-8")
    return path


def answered(
    source: Path, registry: Any, concurrency: int, *, settings: ServerSettings | None = None, receipts: bool = False
) -> list[bytes]:
    """The lines of the output."""
    settings = settings or ServerSettings()
    fingerprints = {model.id: basis(model.info, settings) for model in registry.list() if model.info}

    async def collect() -> list[bytes]:
        with InputFile(source, settings.max_body_bytes) as file:
            batch = Batch(create_app(registry, settings), fingerprints, concurrency=concurrency, receipts=receipts)
            return [answer.data async for answer in batch.answers(file)]

    return asyncio.run(collect())
