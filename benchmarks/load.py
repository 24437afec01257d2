"""A light HTTP client in a process of its own: N streams at once, stamps on arrival, everything else afterwards.

    python -m benchmarks.load < job.json > answers.json

A client that parses while it measures takes CPU from the server beside it. This one speaks HTTP/1.1 over plain asyncio
transports: while a stream runs it only appends (time, bytes); the framing, the events and the JSON are looked at when
all streams have ended. Loopback and a trusted server only: no TLS, no redirects, one request a connection.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be asked.

    Attributes:
        bodies: one JSON body per request, asked in this order.
        streams: how many requests are open at once.
        seconds: no request is begun after so long, and all are cut 60 seconds later.
    """

    base_url: str
    bodies: list[dict[str, Any]]
    streams: int
    seconds: float
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are seconds after its request was sent.

    Attributes:
        times: of each event that carried text.
        tokens: what `usage` says; 0 if it was not sent.
        reads: how many times the socket had something: fewer than events where the server sent several together.
        error: why it is no answer; empty if it is one.
    """

    began: float
    seconds: float
    times: list[float]
    tokens: int
    prompt_tokens: int
    reads: int
    error: str = ""


def parse(began: float, pieces: list[tuple[float, bytes]]) -> Answer:
    """A recorded response → an answer. `pieces`: (time, bytes) in order of arrival, to the end of the connection."""
    raw = b"".join(data for _, data in pieces)
    ended = pieces[-1][0] - began if pieces else 0.0
    head, separator, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not separator or status != [b"200"]:
        return Answer(began, ended, [], 0, 0, len(pieces), f"HTTP {raw[:300].decode(errors='replace')!r}")
    ends, end = [], 0
    for _, data in pieces:
        end += len(data)
        ends.append(end)
    times: list[float] = []
    tokens = prompt_tokens = 0
    done = False
    for place, event in _events(raw, len(head) + 4, b"transfer-encoding: chunked" in head.lower()):
        if event == b"[DONE]":
            done = True
            continue
        body = json.loads(event)
        if "error" in body:
            return Answer(began, ended, times, tokens, prompt_tokens, len(pieces), str(body["error"]))
        if usage := body.get("usage"):
            tokens, prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            # transformers' own server never sends [DONE]; its last chunk has the reason and the usage.
            done = done or any(choice.get("finish_reason") for choice in body["choices"])
        delta = body["choices"][0]["delta"] if body["choices"] else {}
        if delta.get("content") or delta.get("reasoning_content"):
            times.append(pieces[bisect.bisect_left(ends, place)][0] - began)
    return Answer(
        began, ended, times, tokens, prompt_tokens, len(pieces), "" if done else "the stream ended without [DONE]"
    )


def _events(raw: bytes, start: int, chunked: bool) -> Iterator[tuple[int, bytes]]:
    """The data of each server-sent event, with the offset in `raw` by which it was complete."""
    buffer = b""
    for end, payload in _chunks(raw, start) if chunked else [(len(raw), raw[start:])]:
        *lines, buffer = (buffer + payload).split(b"\n\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield end, line[6:]


def _chunks(raw: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """HTTP/1.1 chunked framing (RFC 9112, 7.1): (offset behind the chunk, its payload)."""
    while (line_end := raw.find(b"\r\n", start)) >= 0:
        size = int(raw[start:line_end].split(b";")[0] or b"0", 16)
        begin, start = line_end + 2, line_end + 2 + size + 2
        if size == 0 or start > len(raw):
            return
        yield start, raw[begin : begin + size]


class _Recorder(asyncio.Protocol):
    """Sends one request, records what comes back."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.began = 0.0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.began = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def run(job: Job) -> dict[str, Any]:
    """Carry out a job: `answers`, `seconds` from the first request to the last byte, `cpu_seconds` of this client."""
    url = urlsplit(job.base_url)
    host = url.hostname
    assert host, job.base_url
    requests = iter([_request(job, url.path, url.netloc, body) for body in job.bodies])
    recorders: list[_Recorder] = []
    loop = asyncio.get_running_loop()
    start = time.perf_counter()

    async def stream() -> None:
        for request in requests:  # shared: each stream takes the next one
            if time.perf_counter() - start > job.seconds:
                return
            recorder = _Recorder(request)
            transport, _ = await loop.create_connection(lambda recorder=recorder: recorder, host, url.port or 80)  # type: ignore[misc]
            recorders.append(recorder)
            try:
                await recorder.ended
            finally:
                transport.abort()

    async with asyncio.timeout(job.seconds + 60):
        await asyncio.gather(*(stream() for _ in range(job.streams)))
    cpu = time.process_time()
    seconds = time.perf_counter() - start
    answers = [asdict(parse(r.began, r.pieces)) for r in recorders]
    return {"answers": answers, "seconds": seconds, "cpu_seconds": cpu}


def _request(job: Job, path: str, host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    key = f"Authorization: Bearer {job.api_key}\r\n" if job.api_key else ""
    head = (
        f"POST {path.rstrip('/')}/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n{key}Connection: close\r\n\r\n"
    )
    return head.encode() + data


def main() -> None:
    job = Job(**json.load(sys.stdin))
    json.dump(asyncio.run(run(job)), sys.stdout)


if __name__ == "__main__":
    main()
