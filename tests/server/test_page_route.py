"""The page at `/`, without a browser: who gets it, with which headers, and who does not."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, call
from fakes import FakeEngine, make_app
from hypothesis import given, strategies as st

from server.accounts.charging import Meter
from server.ledger.store import Ledger
from server.page.files import BUILT, POLICY, read_page
from server.page.serving import accepts_html

ROOT = Path(__file__).resolve().parents[2]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
APP = make_app()
PAGE = read_page()
ASSETS = sorted(path for path in PAGE if path != "/")


def ask(
    path: str, accept: str = BROWSER, *, app: Any = APP, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> Answer:
    given = {"accept": accept, **{name.replace("_", "-"): value for name, value in headers.items()}}
    sent = [(name.encode(), value.encode()) for name, value in given.items()]
    return call(app, path=path, method=method, hosts=[host.encode()], headers=sent)


def test_a_browser_gets_the_page_and_all_that_it_loads() -> None:
    page = ask("/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert sorted(named) == ASSETS, "one script, one style sheet, one icon, and nothing from elsewhere"
    for path in named:
        assert ask(path, "*/*").status == 200
    assert "<style" not in page.body.decode()
    assert not re.search(rb"<script(?![^>]*src=)|\son\w+=", page.body), "the policy allows nothing inline"


@pytest.mark.parametrize("path", ["/", *ASSETS])
def test_every_file_is_guarded(path: str) -> None:
    headers = ask(path).headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"


def test_the_policy_leaves_nothing_open() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types")} == {"'none'"}
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


def test_files_are_kept_for_ever_and_the_page_is_asked_for_anew() -> None:
    assert ask("/").headers["cache-control"] == "no-cache"
    assert ask("/").headers["vary"] == "Accept"
    for path in ASSETS:
        assert "immutable" in ask(path).headers["cache-control"]
        assert re.search(r"-[\w-]{8}\.\w+$", path), "its name changes with its content"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "text/html;q=0, */*", "text/plain"])
def test_other_clients_get_at_the_root_what_they_got(accept: str) -> None:
    answer = ask("/", accept)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert ask("/", accept, app=make_app(ui=False)).error == answer.error


@given(st.text(st.sampled_from("texhml/*,;=q01. "), max_size=30))
def test_any_accept_header_is_read(text: str) -> None:
    assert accepts_html([f"text/html, {text}"])
    assert accepts_html([text]) == any(
        part.split(";")[0].strip().lower() == "text/html" and accepts_html([part]) for part in text.split(",")
    )


def test_the_switch() -> None:
    app = make_app(ui=False)
    for path in ("/", *ASSETS):
        assert ask(path, app=app).status == 404


def test_methods() -> None:
    for path in ("/", *ASSETS):
        head = ask(path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == str(len(PAGE[path].body))
        options = ask(path, method="OPTIONS")
        assert (options.status, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
    for path in ASSETS:
        refused = ask(path, method="POST", content_type="application/json")
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert ask("/assets/page-00000000.js").status == 404


def test_hosts_and_origins_hold_for_the_page() -> None:
    """A name that was made to resolve to this machine gets nothing, nor does a frame in another site's page."""
    assert ask("/", host="evil.example").status == 403
    framed = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}
    assert ask("/", **framed).status == 403
    assert ask(ASSETS[0], "*/*", sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    followed = {**framed, "sec_fetch_dest": "document"}
    assert ask("/", **followed).status == 200


def test_with_keys_the_page_needs_none_and_tells_nothing(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", time.time)
    ledger.create_key("ada")
    meter = Meter(ledger, {}, time.time)
    app = make_app(FakeEngine(), meter=meter)
    try:
        for path in ("/", *ASSETS):
            assert ask(path, app=app).body == PAGE[path].body
        assert ask("/", "application/json", app=app).status == 401
        assert ask("/assets/page-00000000.js", app=app).status == 401
        assert ask("/v1/models", app=app).status == 401
    finally:
        meter.close()


def test_the_build_is_that_of_the_sources() -> None:
    """Needs no node: the build says of which sources it is. Whoever changes one runs `make web`."""
    web = ROOT / "web"
    names = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js"]
    digest = hashlib.sha256()
    for file in [*(web / name for name in names), *sorted_files(web / "src")]:
        digest.update(f"{file.relative_to(web).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    assert digest.hexdigest() == (BUILT / "sources.sha256").read_text().strip(), "run: make web"


def sorted_files(folder: Path) -> list[Path]:
    """Every file below a folder, folder by folder, by name: the order of `web/vite.config.js`."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda one: one.name):
        found += sorted_files(path) if path.is_dir() else [path]
    return found


def test_what_the_page_is_built_from_is_pinned() -> None:
    package = json.loads((ROOT / "web" / "package.json").read_text())
    locked = json.loads((ROOT / "web" / "package-lock.json").read_text())["packages"]
    for name, version in {**package["dependencies"], **package["devDependencies"]}.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in one for name, one in locked.items() if name)


def test_the_page_is_small() -> None:
    assert sum(len(file.body) for file in PAGE.values()) < 300_000
