"""A page in a browser is not a client: what it can send without leave is refused before anything of it is read."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from asgi import CHAT, Answer, begin, call, run
from fakes import FakeEngine, chat, make_app
from live_server import Server, start

from server import logs

Headers = list[tuple[bytes, bytes]]
LOCAL = "http://127.0.0.1"
"""The origin of a page that the server itself has sent, as tests address it."""


def headers(**given: str) -> Headers:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]


class NoMeter:
    """Stands for keys where none is ever asked for."""

    def close(self) -> None: ...

    def health(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a key was looked at ({name}) before the request was known to be a client's")


def refusal(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.error["code"]


# -- for whom ----------------------------------------------------------------------------------------------------------

LOOPBACK = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost",
    "LOCALHOST:1",
    "localhost.",
    "app.localhost",
    "127.9.9.9",
    "[::1]:8000",
]
OTHERS = [
    "rebind.example",
    "rebind.example:8000",
    "localhost.rebind.example",
    "127.0.0.1.rebind.example",
    "192.168.1.5",
    "0.0.0.0",
    "host.docker.internal",
    "box.local",
]
BAD = ["", "user@localhost", "localhost, rebind.example", "localhost:http", "local host", "h\xe9", "[::1"]
ALL_PATHS = [CHAT, "/api" + CHAT, "/v1/models", "/v1/usage", "/health/live", "/health/ready", "/openapi.json", "/nope"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_names_of_this_machine_are_served(host: str) -> None:
    assert call(make_app(), chat(), hosts=[host.encode()]).status == 200


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_name_that_was_made_to_lead_here_is_refused(host: str, path: str) -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1, so its browser takes this server for the page's own."""
    engine = FakeEngine()
    for body in (None, chat()):
        answer = call(make_app(engine), body, path=path, hosts=[host.encode()])
        assert refusal(answer) == (403, "host_not_allowed")
        name = host.partition(":")[0].lower()
        assert f"as {name}" in answer.error["message"]
        assert f"`hosts` under `server` in models.yaml: hosts: [{name}]" in answer.error["message"]
    assert not engine.requests


@pytest.mark.parametrize("host", BAD)
@pytest.mark.parametrize("settings", [{}, {"host": "0.0.0.0"}, {"hosts": ["*"]}], ids=["private", "open", "any"])
def test_a_host_that_cannot_be_one_is_refused_everywhere(host: str, settings: dict[str, Any]) -> None:
    answer = call(make_app(**settings), path="/health/live", hosts=[host.encode("latin-1")])
    assert refusal(answer) == (400, "invalid_host")


@pytest.mark.parametrize(
    ("given", "version", "status"),
    [
        ([], "1.1", 400),
        ([], "1.0", 200),
        (["localhost", "localhost"], "1.1", 400),
        (["localhost", "rebind.example"], "1.1", 400),
        (["rebind.example", "localhost"], "1.0", 400),
        (["rebind.example"], "1.0", 403),
    ],
)
def test_a_request_says_once_for_whom_it_is(given: list[str], version: str, status: int) -> None:
    """Without one passes only what no browser speaks: health checks of load balancers do."""
    hosts = [host.encode() for host in given]
    assert call(make_app(), path="/v1/models", hosts=hosts, http_version=version).status == status


@pytest.mark.parametrize(
    ("settings", "keys", "host", "path", "status"),
    [
        ({"hosts": ["box.lan"]}, False, "box.lan:8000", "/v1/models", 200),
        ({"hosts": ["box.lan"]}, False, "BOX.LAN", "/v1/models", 200),
        ({"hosts": ["*.lan"]}, False, "box.lan", "/v1/models", 200),
        ({"hosts": ["box.lan"]}, False, "localhost", "/v1/models", 200),
        ({"hosts": ["box.lan"]}, False, "rebind.example", "/v1/models", 403),
        ({"hosts": ["box.lan"]}, False, "rebind.example", "/health/live", 403),
        ({"hosts": ["*"]}, False, "rebind.example", "/v1/models", 200),
        ({"host": "::1"}, False, "rebind.example", "/v1/models", 403),
        ({"host": "localhost"}, False, "rebind.example", "/v1/models", 403),
        ({"host": "127.0.0.2"}, False, "rebind.example", "/v1/models", 403),
        # where others can reach the address, any name may be a right one, unless they are told
        ({"host": "0.0.0.0"}, False, "box.lan", "/v1/models", 200),
        ({"host": "0.0.0.0", "hosts": ["box.lan"]}, False, "other.lan", "/v1/models", 403),
        ({"host": "10.0.0.7", "hosts": ["box.lan"]}, False, "10.0.0.7:8000", "/v1/models", 200),
        # a load balancer asks by address; what tells nothing may be asked for under any name
        ({"host": "0.0.0.0", "hosts": ["box.lan"]}, False, "10.1.2.3", "/health/live", 200),
        ({"host": "0.0.0.0", "hosts": ["box.lan"]}, False, "10.1.2.3", "/health/ready", 403),
        ({"hosts": ["box.lan"]}, True, "10.1.2.3", "/health/ready", 200),
        ({"hosts": ["box.lan"]}, True, "10.1.2.3", "/v1/models", 403),
        ({}, True, "box.lan", "/health/ready", 200),
    ],
)
def test_whose_names_are_served(settings: dict[str, Any], keys: bool, host: str, path: str, status: int) -> None:
    meter: Any = NoMeter() if keys else None
    assert call(make_app(meter=meter, **settings), path=path, hosts=[host.encode()]).status == status


# -- from whom ---------------------------------------------------------------------------------------------------------

FOREIGN: list[tuple[str, Headers]] = [
    ("another site", headers(origin="https://evil.example")),
    ("another port", headers(origin="http://127.0.0.1:3000")),
    ("another name of this machine", headers(origin="http://localhost")),
    ("null", headers(origin="null")),
    ("null, as of a sandboxed frame", headers(origin="null", sec_fetch_site="cross-site")),
    ("an empty one", headers(origin="")),
    ("two", headers(origin=LOCAL) + headers(origin="https://evil.example")),
    ("an old list", headers(origin=f"{LOCAL} https://evil.example")),
    ("userinfo", headers(origin="http://127.0.0.1@evil.example")),
    ("a file", headers(origin="file://")),
    ("an extension", headers(origin="chrome-extension://abcdef")),
    ("none, from another site", headers(sec_fetch_site="cross-site")),
    ("none, from another port", headers(sec_fetch_site="same-site")),
    ("its own, from another site", headers(origin=LOCAL, sec_fetch_site="cross-site")),
    ("a frame", headers(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="iframe")),
    ("an image", headers(sec_fetch_site="cross-site", sec_fetch_mode="no-cors", sec_fetch_dest="image")),
]
JSON = headers(content_type="application/json")


@pytest.mark.parametrize("sent", [sent for _, sent in FOREIGN], ids=[name for name, _ in FOREIGN])
def test_a_page_of_another_origin_gets_nothing_and_nothing_runs(sent: Headers) -> None:
    """Also what only reads: what it tells is nobody's business, and even its time tells something."""
    engine = FakeEngine()
    for path in ALL_PATHS:
        for method, body in (("GET", None), ("HEAD", None), ("OPTIONS", None), ("POST", chat())):
            answer = call(make_app(engine), body, path=path, method=method, headers=[*sent, *JSON])
            assert answer.status == 403, (path, method)
            assert method == "HEAD" or answer.error["code"] == "origin_not_allowed"
            assert not any(name.startswith("access-control") for name in answer.headers)
    assert not engine.requests


def test_the_refusal_says_which_setting_to_change() -> None:
    answer = call(make_app(), chat(), headers=[*headers(origin="http://localhost:3000"), *JSON])
    assert "cors_origins: ['http://localhost:3000']" in answer.error["message"]
    assert (
        call(
            make_app(cors_origins=["http://localhost:3000"]),
            chat(),
            headers=headers(origin="http://localhost:3000") + JSON,
        ).status
        == 200
    )


@pytest.mark.parametrize(
    "sent",
    [
        headers(origin=LOCAL),
        headers(origin=LOCAL, sec_fetch_site="same-origin"),
        headers(origin="https://127.0.0.1"),  # a proxy in front of it ends TLS
        headers(sec_fetch_site="same-origin"),
        headers(sec_fetch_site="none"),
        headers(sec_fetch_mode="cors"),  # Node's fetch
        [],
    ],
    ids=lambda sent: " ".join(f"{k.decode()}:{v.decode()}" for k, v in sent) or "a client",
)
def test_the_servers_own_pages_and_clients_are_served(sent: Headers) -> None:
    assert call(make_app(), chat(), headers=[*sent, *JSON]).status == 200
    assert call(make_app(), path="/v1/models", headers=sent).status == 200


def test_a_link_from_another_site_may_be_followed_to_read_but_sends_nothing() -> None:
    followed = headers(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document")
    assert call(make_app(), path="/v1/models", headers=followed).status == 200
    assert call(make_app(), chat(), headers=[*followed, *JSON]).status == 403


@pytest.mark.parametrize("allowed", ["https://app.example", "*", "null"])
def test_what_cors_names_goes_on_working(allowed: str) -> None:
    origin = {"*": "https://app.example"}.get(allowed, allowed)
    app = make_app(cors_origins=[allowed])
    page = headers(origin=origin, sec_fetch_site="cross-site", sec_fetch_mode="cors")
    asked = headers(access_control_request_method="POST", access_control_request_headers="content-type")
    preflight = call(app, method="OPTIONS", path=CHAT, headers=[*page, *asked])
    assert (preflight.status, preflight.headers["access-control-allow-origin"]) in ((200, origin), (200, "*"))
    for body, path in ((chat(), CHAT), (None, "/v1/models")):
        answer = call(app, body, path=path, headers=[*page, *JSON])
        assert (answer.status, answer.headers["access-control-allow-origin"]) in ((200, origin), (200, "*"))
    # its errors reach it, too
    answer = call(app, chat(), headers=[*page, *headers(content_type="text/plain")])
    assert refusal(answer) == (415, "unsupported_media_type")
    assert "access-control-allow-origin" in answer.headers
    if allowed != "*":
        assert call(app, chat(), headers=[*headers(origin="https://evil.example"), *JSON]).status == 403


def test_a_page_of_the_internet_that_cors_names_may_ask_for_a_private_address() -> None:
    """Chrome asks for that in the preflight, too, and a status that is not 200 ends it."""
    app = make_app(cors_origins=["https://app.example"])
    asked = headers(access_control_request_method="POST", access_control_request_private_network="true")
    page = headers(origin="https://app.example", sec_fetch_site="cross-site")
    preflight = call(app, method="OPTIONS", path=CHAT, headers=[*page, *asked])
    assert preflight.status == 200
    assert preflight.headers.get("access-control-allow-private-network", "true") == "true"
    other = headers(origin="https://evil.example", sec_fetch_site="cross-site")
    assert call(app, method="OPTIONS", path=CHAT, headers=[*other, *asked]).status == 403


def test_no_key_is_looked_at_for_a_page_of_another_origin() -> None:
    meter: Any = NoMeter()
    assert call(make_app(meter=meter), chat(), headers=headers(origin="https://evil.example")).status == 403


def test_nothing_speaks_websocket() -> None:
    """A page may open one to anybody, without a preflight."""
    assert [message["type"] for message in run(_websocket(make_app()))] == ["websocket.close"]


async def _websocket(app: Any) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": CHAT,
        "headers": [(b"host", b"localhost")],
        "query_string": b"",
        "subprotocols": [],
    }
    await app(scope, receive, send)
    return sent


# -- as what -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "text/plain, application/json",
        "application/json, text/plain",
        "application/jsonx",
        "text/json",
        "x application/json",
        "application/octet-stream",
        "+json",
        "text/x+json",
    ],
)
def test_what_a_page_may_send_unasked_is_no_request(content_type: str) -> None:
    engine = FakeEngine()
    answer = call(make_app(engine), chat(), headers=headers(content_type=content_type))
    assert refusal(answer) == (415, "unsupported_media_type")
    assert content_type in answer.error["message"]
    assert "Content-Type: application/json" in answer.error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json ;x=y",
        "application/vnd.api+json",
    ],
)
def test_json_is_taken_however_it_is_spelled(content_type: str) -> None:
    assert call(make_app(), chat(), headers=headers(content_type=content_type)).status == 200


def test_a_body_without_a_type_passes_only_from_a_client() -> None:
    """A page's browser leaves the type out, too, and then asks for no leave; it cannot leave its origin out."""
    assert call(make_app(), chat()).status == 200
    assert call(make_app(), chat(), headers=headers(content_type="")).status == 200
    for page in (headers(origin=LOCAL), headers(sec_fetch_site="same-origin"), headers(sec_fetch_site="none")):
        assert call(make_app(), chat(), headers=page).status == 415
    both = [*headers(content_type="application/json"), *headers(content_type="text/plain")]
    assert call(make_app(), chat(), headers=both).status == 415


def test_a_refusal_reads_nothing_of_the_body() -> None:
    async def ask(sent: Headers, hosts: list[bytes]) -> Answer:
        exchange = begin(make_app(), [b"x" * 10], headers=sent, hosts=hosts)

        async def receive() -> Any:
            raise AssertionError("the body was read")

        exchange.receive = receive  # type: ignore[method-assign]
        return await exchange.ended()

    for sent, hosts in (
        (headers(content_type="text/plain"), [b"localhost"]),
        (headers(origin="null"), [b"localhost"]),
        ([], [b"rebind.example"]),
        ([], []),
    ):
        assert run(ask(sent, hosts)).status in (400, 403, 415)


def test_a_refusal_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "verbatim.access"):
        call(make_app(), path="/v1/models", hosts=[b"rebind.example"])
    [record] = [r for r in caplog.records if r.name == logs._ACCESS.name]
    assert record.fields["refused"] == "host_not_allowed"  # type: ignore[attr-defined]


# -- all of it over a socket -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("door")
    (folder / "models.yaml").write_text(
        f"models: [{{id: tiny, path: {tiny('qwen3')}, context_length: 128, cache_size: 8MiB}}]\n"
        "server: {hosts: [box.lan], cors_origins: ['https://app.example']}\n"
    )
    with start([], folder) as running:
        yield running


_BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2})
_POST = "POST /v1/chat/completions HTTP/1.1"
_GET = "GET /v1/models HTTP/1.1"
_IS_JSON = "Content-Type: application/json"
_PREFLIGHT = "Access-Control-Request-Method: POST"
_UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
)
_OPTIONS = "OPTIONS /v1/chat/completions HTTP/1.1"
RAW = [
    # first line, header lines, status
    (_GET, "Host: localhost", 200),
    (_GET, "hOST:LOCALHOST.:99", 200),
    (_GET, "Host: box.lan", 200),
    (_GET, "Host: rebind.example", 403),
    (_GET, "X: y", 400),
    (_GET, "Host:", 400),
    (_GET, "Host: localhost\r\nHost: rebind.example", 400),
    (_GET, "Host: user@localhost", 400),
    ("GET /v1/models HTTP/1.0", "X: y", 200),
    ("GET http://localhost/v1/models HTTP/1.1", "Host: localhost", 200),
    ("GET http://rebind.example/v1/models HTTP/1.1", "Host: localhost", 400),
    ("GET http://rebind.example/v1/models HTTP/1.1", "Host: rebind.example", 403),
    ("GET http://rebind.example/v1/models HTTP/1.0", "X: y", 403),
    ("GET http://user@localhost/v1/models HTTP/1.1", "Host: localhost", 400),
    ("GET /health/live HTTP/1.1", "Host: rebind.example", 403),
    ("OPTIONS * HTTP/1.1", "Host: rebind.example", 403),
    ("GET /v1/chat/completions HTTP/1.1", f"Host: localhost\r\nOrigin: https://evil.example\r\n{_UPGRADE}", 403),
    (_POST, "Host: localhost", 200),
    (_POST, "Host: localhost\r\nContent-Type: application/json; charset=utf-8", 200),
    (_POST, "Host: localhost\r\nContent-Type: text/plain", 415),
    (_POST, "Host: localhost\r\nContent-Type: application/x-www-form-urlencoded", 415),
    (_POST, "Host: localhost\r\nContent-Type: multipart/form-data; boundary=b", 415),
    (_POST, f"Host: localhost\r\nOrigin: null\r\n{_IS_JSON}", 403),
    (_POST, f"Host: localhost\r\nSec-Fetch-Site: cross-site\r\n{_IS_JSON}", 403),
    (_POST, f"Host: localhost\r\nOrigin: https://evil.example\r\n{_IS_JSON}", 403),
    (_POST, f"Host: localhost:7\r\nOrigin: http://localhost:7\r\n{_IS_JSON}", 200),
    (_POST, "Host: localhost:7\r\nOrigin: http://localhost:7", 415),
    (_POST, f"Host: localhost\r\nOrigin: https://app.example\r\nSec-Fetch-Site: cross-site\r\n{_IS_JSON}", 200),
    (_OPTIONS, f"Host: localhost\r\nOrigin: https://app.example\r\n{_PREFLIGHT}", 200),
    (_OPTIONS, f"Host: localhost\r\nOrigin: https://evil.example\r\n{_PREFLIGHT}", 403),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "lines", "status"), RAW, ids=[f"{line} {lines}"[:100] for line, lines, _ in RAW])
def test_over_a_socket(server: Server, line: str, lines: str, status: int) -> None:
    """What a browser or anybody else writes, byte for byte, and the first line of the answer."""
    body = _BODY if line.startswith("POST") else ""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(f"{line}\r\n{lines}\r\n{length}\r\n{body}".encode("latin-1"))
        answer = connection.makefile("rb").readline()
    assert answer.split()[1] == str(status).encode()


@pytest.mark.slow
def test_the_official_client_is_served_and_told(server: Server) -> None:
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert server.client().chat.completions.create(**ask).choices
    assert list(server.client().chat.completions.create(**ask, stream=True))
    with pytest.raises(openai.PermissionDeniedError, match=r"hosts: \[llm\.example\]"):
        server.client(default_headers={"Host": "llm.example"}).chat.completions.create(**ask)
