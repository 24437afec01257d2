"""Open WebUI: its server in front of ours, asked as its own page asks it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

from tool import Tool, holds
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

START = 110
"""Seconds that its first start may take: it makes a database."""
SETTINGS = {
    "OPENAI_API_BASE_URL": BASE,
    "OPENAI_API_KEY": KEY,
    "ENABLE_OLLAMA_API": "false",
    "WEBUI_AUTH": "false",
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "SCARF_NO_ANALYTICS": "true",
    "RAG_EMBEDDING_ENGINE": "openai",
    "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PORT = free_port()
TOKEN: list[str] = []


def call(path: str, body: Any = None, seconds: float = 30) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {TOKEN[0]}"} if TOKEN else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=seconds) as response:
        text = response.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


def chat(**more: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "stream": False, **more}
    return call("/api/chat/completions", body)


def plain() -> None:
    same(chat()["choices"][0]["message"]["content"], ANSWER)
    same([model["id"] for model in call("/api/models")["data"] if model["id"] == MODEL], [MODEL])


def stream() -> None:
    pieces = [line[6:] for line in chat(stream=True).splitlines() if line.startswith("data: {")]
    told = [json.loads(piece)["choices"] for piece in pieces]
    same("".join(choices[0]["delta"].get("content") or "" for choices in told if choices), ANSWER)


def tools() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    told = chat(tools=[{"type": "function", "function": {"name": "add", "parameters": parameters}}])
    holds(json.dumps(told), '"name": "add"')


def seed() -> None:
    seeded(lambda number: chat(seed=number, temperature=1, max_tokens=24)["choices"][0]["message"]["content"])


def main() -> None:
    with Tool("open-webui") as tool:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tool.home), "DATA_DIR": str(tool.home), **SETTINGS}
        process = subprocess.Popen(
            [str(tool.path), "serve", "--host", "127.0.0.1", "--port", str(PORT)],
            cwd=tool.work,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait(process)
            TOKEN.append(call("/api/v1/auths/signin", {"email": "", "password": ""})["token"])
            run("chat/completions", {"plain": plain, "stream": stream, "tools": (tools, ADD), "seed": (seed, DRAWN)})
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while True:
        try:
            call("/health", seconds=2)
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Open WebUI did not start within {START} s") from None
            time.sleep(1)


main()
