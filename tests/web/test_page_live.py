"""The page over a real server in a process of its own: models that load and leave, the machine, keys for an admin."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from browsing import expect

if TYPE_CHECKING:
    from browsing import Tab
    from live_server import Server

    Live = Callable[[Path], Server]
    Open = Callable[..., Tab]

pytestmark = pytest.mark.slow

TINY = "cache_size: 8MiB, context_length: 256, threads: 1"
LOADING = 180_000
"""Milliseconds that a load may take: another process, which imports the libraries."""


def write(folder: Path) -> None:
    (folder / "models.yaml").write_text(
        f"models:\n  - {{id: noise, builtin: noise, {TINY}}}\n"
        f"  - {{id: demo, builtin: demo, load: on_demand, {TINY}}}\nserver: {{port: 0}}\n"
    )


def choose(page: Any, model: str, state: str) -> None:
    page.get_by_role("button", name=f"Model: {model}, {state}", exact=True).click()


def test_models_load_and_leave_at_a_press(live: Live, open_tab: Open, tmp_path: Path) -> None:
    write(tmp_path)
    server = live(tmp_path)
    tab = open_tab(server.url)
    page = tab.open()
    choose(page, "noise", "ready")
    page.get_by_role("button", name="Load demo", exact=True).click()
    expect(page.get_by_role("button", name="Unload demo", exact=True)).to_be_visible(timeout=LOADING)
    page.locator(".model-choice", has_text="demo").click()
    tab.say("Tell me a story about a fox.")
    expect(page.locator(".reply").last).to_contain_text("fox", timeout=LOADING)
    tab.tab("Machine")
    for name in ("demo", "noise"):
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    shown = page.locator(".tile", has=page.get_by_text("Memory", exact=True)).locator(".tile-value")
    expect(shown.first).to_contain_text("iB")
    choose(page, "demo", "ready")
    page.get_by_role("button", name="Unload demo", exact=True).click()
    expect(page.get_by_role("button", name="Load demo", exact=True)).to_be_visible(timeout=LOADING)
    assert httpx.get(f"{server.url}/v1/models/demo").json()["state"] == "unloaded"


def test_an_admin_sees_all_keys_and_what_they_have_used(live: Live, open_tab: Open, tmp_path: Path) -> None:
    write(tmp_path)
    secrets = []
    for name, *options in (("ada", "--admin"), ("bob",)):
        made = subprocess.run(
            [sys.executable, "-c", "from server.cli import main; main()", "keys", "create", name, "--json", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        secrets.append(json.loads(made.stdout)["key"])
    server = live(tmp_path)
    tab = open_tab(server.url)
    tab.expected = ("401",)
    page = tab.open()
    page.get_by_label("Key", exact=True).fill(secrets[0])
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Model: noise, ready", exact=True)).to_be_visible()
    tab.tab("Machine")
    for name in ("ada", "bob"):
        expect(page.get_by_role("row", name=name)).to_be_visible()
    assert not any(secret in page.content() for secret in secrets)
