"""Clients of other languages against the server's own protocol: curl, and Java's, whose default is to ask for HTTP/2.

And what no client may meet: an error in plain text, whatever it sends.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import make_app
from wire_client import LIVE, Wire, good, post, serving

from server.wire.envelope import Envelope

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serving(make_app(cors_origins=["https://app.example"], hosts=["localhost"], max_body_bytes=10**6)) as running:
        yield running


# -- a wish for another protocol ---------------------------------------------------------------------------------------

WISHES = [
    ("h2c", "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
    ("h2c in another order", "http2-settings: AAMAAABk", "upgrade: h2c", "connection: http2-settings, upgrade"),
    ("websocket", "connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: eA=="),
    ("several", "connection: upgrade", "upgrade: h2c, websocket"),
    ("no such protocol", "connection: upgrade", "upgrade: x/9"),
    ("not in Connection", "upgrade: h2c"),
    ("settings alone", "http2-settings: AAMAAABk"),
]


@pytest.mark.parametrize("fields", [wish[1:] for wish in WISHES], ids=[wish[0] for wish in WISHES])
def test_a_wish_for_another_protocol_is_ignored(wire: Wire, fields: tuple[str, ...]) -> None:
    """The answer is that to the same request without the wish, and the connection goes on in HTTP/1.1."""
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(good()), good())
    get = LIVE.replace(b"\r\n\r\n", b"\r\n" + "\r\n".join([*fields, "", ""]).encode())
    with wire.client() as client:
        for data in (post(good(), *fields), post(b"", "transfer-encoding: chunked", *fields) + chunks, get, LIVE):
            client.send(data)
            reply = client.reply()
            assert reply
            assert reply.status == 200
            assert "upgrade" not in reply.headers


@pytest.mark.parametrize(
    "data", [PREFACE, PREFACE + bytes(9), b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n"]
)
@pytest.mark.parametrize("before", [b"", LIVE], ids=["first", "after a request"])
def test_http2_without_asking_is_refused_by_name(wire: Wire, before: bytes, data: bytes) -> None:
    with wire.client() as client:
        client.send(before + data)
        if before:
            assert client.reply().status == 200  # type: ignore[union-attr]
        reply = client.reply()
        assert reply
        assert (reply.status, reply.code) == (505, "http_version_not_supported")
        assert b"HTTP/1.1" in reply.body
        assert client.closed()


curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@curl
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--http2", "-d", '{"model":"fake","messages":[{"role":"user","content":"Hi"}]}', CHAT], '"chat.completion"'),
        (["--http2", "/version"], '"version"'),
        (["--http2", "-I", "/v1/models"], "200 OK"),
        (["-I", "/health"], "200 OK"),
        (["--http2-prior-knowledge", "/version"], "HTTP/2"),
        (["-X", "OPTIONS", "-i", CHAT], "allow: POST, OPTIONS"),
        (["-X", "OPTIONS", "-i", "--request-target", "*", ""], "204 No Content"),
        (["-i", "/v1/models/"], "200 OK"),
        (["/chat/completions"], "end in /v1"),
    ],
    ids=lambda given: " ".join(given)[:40] if isinstance(given, list) else "",
)
def test_curl(wire: Wire, options: list[str], said: str) -> None:
    *flags, path = options
    fields = ["-H", "Content-Type: application/json"] if "-d" in flags else []
    command = ["curl", "-sSv", "-m", "20", *flags, *fields, f"http://127.0.0.1:{wire.port}{path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said in done.stdout + done.stderr, done


JAVA = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.stream.Collectors;

public class Ask {
    public static void main(String[] given) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (String body : new String[] {given[1], given[2]}) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(given[0] + "/v1/chat/completions"))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body)).build();
            HttpResponse<java.util.stream.Stream<String>> answer =
                client.send(request, HttpResponse.BodyHandlers.ofLines());
            System.out.println(answer.statusCode() + " " + answer.version());
            System.out.println(answer.body().collect(Collectors.joining("|")));
        }
        HttpRequest get = HttpRequest.newBuilder(URI.create(given[0] + "/v1/models")).build();
        System.out.println(client.send(get, HttpResponse.BodyHandlers.ofString()).body());
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")
def test_javas_own_client(wire: Wire, tmp_path: Path) -> None:
    """It asks for h2c beside every request, with a body, a stream and without either."""
    (tmp_path / "Ask.java").write_text(JAVA)
    bodies = [good().decode(), good(stream=True).decode()]
    command = ["java", "-XX:TieredStopAtLevel=1", str(tmp_path / "Ask.java"), f"http://127.0.0.1:{wire.port}", *bodies]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("200")] == ["200 HTTP_1_1"] * 2, done
    assert "Hello wörld!" in lines[1]
    assert "chat.completion.chunk" in lines[3]
    assert "data: [DONE]" in lines[3]
    assert '"object":"list"' in lines[4]


# -- no error in plain text --------------------------------------------------------------------------------------------

ORIGIN = {"origin": "https://app.example"}
ASKED = {**ORIGIN, "access-control-request-method": "POST"}
ERRORS: list[tuple[str, str, dict[str, str], bytes, int]] = [
    # method, path, headers, body, status
    ("GET", "/nope", {}, b"", 404),
    ("GET", "/v1/models/nope", {}, b"", 404),
    ("GET", "/v1/receipts/x", {}, b"", 404),
    ("GET", "/v1/usage", {}, b"", 404),
    ("POST", "/v1/embeddings", {}, b"{}", 404),
    ("OPTIONS", "/nope", {}, b"", 404),
    ("GET", CHAT, {}, b"", 405),
    ("PUT", "/v1/models", {}, b"{}", 405),
    ("TRACE", "/health", {}, b"", 405),
    ("PROPFIND", "/health", {}, b"", 405),
    ("POST", CHAT, {}, b"", 400),
    ("POST", CHAT, {}, b"{", 400),
    ("POST", CHAT, {}, b"\xff", 400),
    ("POST", CHAT, {}, b'{"model": "fake", "messages": 1}', 400),
    ("POST", CHAT, {"content-encoding": "gzip"}, b"{}", 400),
    ("POST", CHAT, {"content-encoding": "br"}, b"{}", 415),
    ("POST", CHAT, {"content-type": "text/plain"}, b"{}", 415),
    ("POST", CHAT, {}, b" " * (10**6 + 1), 413),
    ("POST", CHAT, {}, good(temperature=9), 422),
    ("POST", CHAT, {}, good(model="nope"), 404),
    ("GET", "/v1/receipts?limit=x", {}, b"", 422),
    ("GET", "/health", {"host": "rebind.example"}, b"", 403),
    ("GET", "/health", {"host": "a b"}, b"", 400),
    ("GET", "/health", {"origin": "https://evil.example"}, b"", 403),
    ("OPTIONS", CHAT, {**ASKED, "origin": "https://evil.example"}, b"", 403),
    ("OPTIONS", CHAT, {**ASKED, "access-control-request-method": "PUT"}, b"", 403),
    ("GET", "/" + "a" * 9000, {}, b"", 414),
    ("GET", "/health", {"x-a": "a" * 70_000}, b"", 431),
    ("GET", "http://a", {}, b"", 400),
    ("GET", "/\xff", {}, b"", 400),
]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"), ERRORS, ids=[f"{e[4]} {e[0]} {e[1]}"[:40] for e in ERRORS]
)
def test_no_error_is_in_plain_text(
    wire: Wire, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    """Clients parse an error's body; what is no JSON hides the cause behind an error of theirs."""
    fields = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    with wire.client() as client:
        client.send("\r\n".join(lines).encode("latin-1") + body)
        reply = client.reply()
        assert reply
        assert reply.status == status
        assert reply.code, "its shape is checked"
        assert reply.headers["content-type"] == "application/json"


def test_no_preflight_is_answered_in_plain_text(wire: Wire) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{wire.port}") as client:
        good = client.options(CHAT, headers=ASKED)
        assert (good.status_code, good.content) == (200, b"")
        assert good.headers["access-control-allow-origin"] == "https://app.example"
        assert "content-type" not in good.headers
        bad = client.options(CHAT, headers={**ASKED, "access-control-request-method": "PUT"})
        assert "may not send PUT" in bad.json()["error"]["message"]
        assert "POST" in bad.headers["access-control-allow-methods"]


async def _fails(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("a bug")


async def _waits(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(1000)


@pytest.mark.parametrize(("app", "status"), [(_fails, 500), (_waits, 503)], ids=["a bug", "cancelled at the end"])
def test_what_fails_or_is_cancelled_answers_json(app: Any, status: int) -> None:
    """uvicorn's own answer to both is a line of text. The second is what a request sees whose server stops."""
    with serving(Envelope(app)) as running:
        client = running.client()
        client.send(LIVE)
        reply = client.reply() if app is _fails else None
    reply = reply or client.reply()  # the second comes once the server stops
    assert reply
    assert (reply.status, bool(reply.code)) == (status, True)
    assert reply.headers["content-type"] == "application/json"
    client.socket.close()
