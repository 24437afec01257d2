"""A tab of a real Chromium that watches itself: errors, breaches of the policy and foreign requests fail its test."""

from __future__ import annotations

import os
import shutil
from typing import Any, Final

import pytest

try:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Request, expect, sync_playwright
except ImportError:  # the tests are skipped
    WHY = "playwright is not installed"
else:
    WHY = ""

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
WHY = WHY or ("" if CHROMIUM else "there is no Chromium")
NEEDS_CHROMIUM: Final = pytest.mark.skipif(bool(WHY), reason=WHY)
PATIENCE: Final = 60_000
"""Milliseconds that anything may take before a test fails."""

__all__ = ["CHROMIUM", "NEEDS_CHROMIUM", "WHY", "Tab", "expect", "launch", "sync_playwright"]


def launch(playwright: Playwright) -> Browser:
    """Start the browser. As root it runs only without its sandbox, and then it opens nothing but loopback."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=PATIENCE)
    return playwright.chromium.launch(executable_path=CHROMIUM, args=[*arguments, "--disable-gpu"])


class Tab:
    """A page in a context of its own, with an empty history. `errors`: what must not happen."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.expected: tuple[str, ...] = ()
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(f"error: {error}"))
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) => "
            "console.error('policy: ' + event.violatedDirective + ' ' + event.blockedURI))"
        )

    def open(self, at: str = "/") -> Page:
        self.page.goto(self.url + at)
        return self.page

    def close(self) -> None:
        self.context.close()
        unexpected = [one for one in self.errors if not any(text in one for text in self.expected)]
        assert not unexpected, unexpected

    def _request(self, request: Request) -> None:
        self.requests.append(request.url)
        if not request.url.startswith((f"{self.url}/", "blob:", "data:")):
            self.errors.append(f"foreign: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    # -- what tests do often -------------------------------------------------------------------------------------------

    def begin(self, text: str) -> None:
        """Write a message and send it, once there is a model to send it to."""
        self.page.get_by_label("Message", exact=True).fill(text)
        expect(self.page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
        self.page.keyboard.press("Enter")

    def say(self, text: str) -> None:
        """Send a message, and wait for the end of the reply."""
        self.begin(text)
        self.ended()

    def ended(self) -> None:
        expect(self.page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)
        expect(self.page.locator(".reply.live")).to_have_count(0)

    def tab(self, name: str) -> None:
        self.page.get_by_role("navigation").get_by_role("link", name=name).click()
