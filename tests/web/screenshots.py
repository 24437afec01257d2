"""Makes the screenshots of the page in docs/images, with the demo model: python tests/web/screenshots.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "web")]

from browsing import Tab, launch, sync_playwright  # noqa: E402
from page_server import served  # noqa: E402

from engine import ModelConfig, Registry  # noqa: E402
from server.app import create_app  # noqa: E402

QUESTION = "Tell me a story about a fox."
DESK: dict[str, Any] = {"viewport": {"width": 1200, "height": 760}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry([ModelConfig(id="demo", path=ROOT / "demo" / "model", device="cpu", threads=1)])
    registry.start()
    registry.wait()
    try:
        with served(create_app(registry)) as server, sync_playwright() as playwright:
            browser = launch(playwright)
            for scheme in ("light", "dark"):
                tab = Tab(browser, server.url, color_scheme=scheme, **DESK)
                desk(tab, folder, scheme)
                tab.close()
            tab = Tab(browser, server.url, color_scheme="light", **PHONE)
            tab.open()
            talk(tab)
            tab.page.screenshot(path=folder / "page-phone.png")
            tab.close()
            browser.close()
    finally:
        registry.close()


def talk(tab: Tab) -> None:
    page = tab.page
    page.get_by_label("Seed", exact=True).fill("7")
    tab.say(QUESTION)
    page.get_by_role("button", name="Same again", exact=True).last.click()
    page.get_by_text("The same again, to the bit").wait_for()


def desk(tab: Tab, folder: Path, scheme: str) -> None:
    page = tab.open()
    talk(tab)
    page.screenshot(path=folder / f"page-chat-{scheme}.png")
    tab.tab("Tokens")
    page.get_by_role("button", name="Add processed probabilities").click()
    page.get_by_text("Raw and processed").wait_for()
    page.locator(".token").nth(6).click()
    page.screenshot(path=folder / f"page-tokens-{scheme}.png")
    tab.tab("Receipts")
    page.get_by_role("button", name="Inspect and check").click()
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("identical").first.wait_for()
    page.locator(".spelled").scroll_into_view_if_needed()
    page.screenshot(path=folder / f"page-receipt-{scheme}.png")
    tab.tab("Machine")
    page.get_by_text("Tokens/s").first.wait_for()
    page.screenshot(path=folder / f"page-machine-{scheme}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
