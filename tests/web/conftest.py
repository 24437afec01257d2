"""One browser for a file of tests, one server over fakes for each, and one with a real engine that follows a script."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import NEEDS_CHROMIUM, WHY, Tab, launch
from live_server import Server, start
from page_server import PageServer, Real, served

from engine import ModelConfig, Registry
from server.app import create_app

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(NEEDS_CHROMIUM)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Open for a module only: while it is, an event loop runs in this thread, and `asyncio.run` fails."""
    if WHY:
        pytest.skip(WHY)
    from browsing import sync_playwright

    with sync_playwright() as playwright:
        made = launch(playwright)
        yield made
        made.close()


@pytest.fixture
def open_tab(browser: Any, serve: Any, live: Any) -> Iterator[Callable[..., Tab]]:
    """`open_tab(url)`: a tab with nothing stored. What went wrong in it fails the test when it ends.

    Servers come first, so that they end last: a page that still asks for its models would meet a closed port.
    """
    tabs: list[Tab] = []

    def made(url: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield made
    for tab in tabs:
        tab.close()


@pytest.fixture
def live() -> Iterator[Callable[[Path], Server]]:
    """`live(folder)`: a server in a process of its own, with the folder's models.yaml, for the time of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(start([], folder))


@pytest.fixture
def serve() -> Iterator[Callable[[Any], PageServer]]:
    """`serve(app)`: a server for the time of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(served(app))


@pytest.fixture(scope="session")
def engine_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    from clients.scripted_server import MODEL, ScriptedModel, checkpoint

    folder = tmp_path_factory.mktemp("page")
    entry = ModelConfig(id=MODEL, path=checkpoint(folder / "checkpoint"), device="cpu", threads=1, context_length=512)
    registry = Registry([entry])
    registry.start()
    registry.wait()
    engine: Any = registry.get(MODEL)
    model = ScriptedModel()
    engine.engine.prepare = model.scripted(engine.engine.prepare, engine.engine.model.grammars)
    try:
        with served(create_app(registry)) as server:
            yield Real(server, model)
    finally:
        registry.close()


@pytest.fixture
def real(engine_server: Real) -> Iterator[Real]:
    """The same, saying what its weights say: its receipts can be checked."""
    engine_server.say(free=True)
    yield engine_server
    engine_server.say(free=True)
