"""What a model writes is hostile, and so are files: nothing runs, loads, or leaves its place. Small screens, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from browsing import Tab, expect
from fakes import FakeEngine, make_app, word_by_word
from page_server import PageServer

Open = Callable[..., Tab]
Serve = Callable[[Any], PageServer]

HTML = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2">
<svg onload="window.hit = 3"></svg>

Inline <b onmouseover="window.hit = 4">bold</b> and <a href="javascript:window.hit = 5">this</a>.

<iframe src="https://evil.example/"></iframe>
<style>body { display: none }</style>
"""
LINKS = """[one](javascript:window.hit=6) [two](JaVaScRiPt:window.hit=7) [three](data:text/html,x)
[four](&#106;avascript:x)
[five](https://example.org/a?b=1&amp;c=2 "title") <javascript:window.hit=8> [six](/v1/models) [seven](//evil.example/x)
[eight](java\tscript:x) ![picture](https://evil.example/p.png) ![dat](data:image/svg+xml,x) https://example.com/plain
"""


def shown(serve: Serve, open_tab: Open, text: str) -> Any:
    tab = open_tab(serve(make_app(FakeEngine(word_by_word(text)))).url)
    page = tab.open()
    tab.say("Write")
    return page


def test_html_is_text(serve: Serve, open_tab: Open) -> None:
    page = shown(serve, open_tab, HTML)
    reply = page.locator(".reply > .prose")
    for tag in ("script", "img", "svg", "iframe", "style", "b", "a"):
        assert reply.locator(tag).count() == 0, tag
    expect(reply).to_contain_text('<img src=x onerror="window.hit = 2">')
    assert page.evaluate("window.hit") is None


def test_only_links_into_the_web_are_links(serve: Serve, open_tab: Open) -> None:
    page = shown(serve, open_tab, LINKS)
    links = page.locator(".reply > .prose a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    assert [href for href, _, _ in links] == ["https://example.org/a?b=1&c=2", "https://example.com/plain"]
    assert all({"noopener", "noreferrer"} <= set(rel.split()) and target == "_blank" for _, rel, target in links)
    assert page.locator(".reply > .prose img").count() == 0
    expect(page.locator(".reply > .prose")).to_contain_text("image: picture")
    assert page.evaluate("window.hit") is None


def test_hidden_characters_are_shown_and_turn_nothing_around(serve: Serve, open_tab: Open) -> None:
    text = "safe \u202egnp.exe \u0000\u0007\u200b end\n\n```sh\nrm \u2066x\u2069 /\n```\n"
    page = shown(serve, open_tab, text)
    reply = page.locator(".reply > .prose")
    assert "\u202e" not in reply.inner_text()
    for name in ("U+202E", "U+0007", "U+200B", "U+2066"):
        expect(reply).to_contain_text(name)
    page.get_by_role("button", name="Tokens").click()
    assert "\u202e" not in page.get_by_label("Tokens of the reply").inner_text()


def test_markdown_is_laid_out(serve: Serve, open_tab: Open) -> None:
    text = (
        "# Title\n\nA **bold** and *slanted* `code` &amp; more.\n\n1. one\n2. two\n   - inner\n\n> said\n\n"
        "| a | b |\n|---|---|\n| 1 | 2<br>3 |\n\n- [x] done\n\n```python\nprint('<b>')\n```\n"
    )
    page = shown(serve, open_tab, text)
    reply = page.locator(".reply > .prose")
    for tag, said in [("h3", "Title"), ("strong", "bold"), ("em", "slanted"), ("blockquote", "said"), ("th", "a")]:
        expect(reply.locator(tag).first).to_have_text(said)
    expect(reply.locator("p").first).to_have_text("A bold and slanted code & more.")
    expect(reply.locator("ol li ul li")).to_have_text("inner")
    expect(reply.locator("pre code")).to_have_text("print('<b>')")
    expect(reply.get_by_role("checkbox")).to_be_checked()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reply.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


@pytest.mark.parametrize(
    "text",
    ["x" * 300_000, "> " * 3000 + "x", "- " * 3000 + "x", "*" * 20_000, "[" * 20_000, "a\n" * 20_000, "|a" * 5000],
    ids=["long", "quotes", "lists", "stars", "brackets", "lines", "cells"],
)
def test_huge_texts_do_not_stop_the_page(serve: Serve, open_tab: Open, text: str) -> None:
    page = shown(serve, open_tab, text)
    expect(page.locator(".reply-foot")).to_contain_text("seed 77")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


HOSTILE_FILE = {
    "format": "verbatim-conversations",
    "conversations": [
        {"id": "a", "title": "<img src=x onerror=alert(1)>", "messages": {
            "m": {"id": "m", "parent": "", "role": "user", "content": "Hi"},
            "r": {"id": "r", "parent": "m", "role": "assistant", "content": HTML, "reply": {
                "tokens": [{"token": 5, "logprob": "x", "top": "no"}, None], "calls": [None, {"name": {}}],
                "seed": "1,\"stream\":false", "sent": {"body": 7, "seed": "1}"}, "usage": 3, "given": 1,
            }},
            "loop": {"id": "loop", "parent": "loop", "role": "user", "content": {}},
            "bad": {"role": "system"},
            "__proto__": {"id": "__proto__", "parent": "", "role": "user", "content": "x"},
        }, "shown": {"": "m", "m": "r", "r": 5, "loop": "loop"}, "created": "now"},
        7, None, {"id": ""},
    ],
}  # fmt: skip


def test_a_file_of_conversations_may_hold_anything(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(make_app()).url)
    page = tab.open()
    data = json.dumps(HOSTILE_FILE).encode()
    page.get_by_label("A file of conversations").set_input_files(
        {"name": "x.json", "mimeType": "application/json", "buffer": data}
    )
    page.get_by_role("button", name="<img src=x onerror=alert(1)>", exact=True).click()
    expect(page.locator(".reply")).to_contain_text("<script>window.hit = 1</script>")
    tab.tab("Tokens")
    expect(page.locator(".token")).to_have_count(2)
    for name in ("Receipts", "Request"):
        tab.tab(name)
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    tab.tab("Chat")
    tab.say("And on it goes")
    expect(page.locator(".reply").last).to_contain_text("Hello wörld!")


# -- phones, keyboards -------------------------------------------------------------------------------------------------

NAMES = ("Chat", "Tokens", "Receipts", "Fingerprint", "Request", "Machine")


def test_a_phone_has_everything_and_scrolls_in_one_direction(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(make_app(FakeEngine(word_by_word("```\n", "long " * 60, "\n```\n", "w" * 300)))).url,
                   viewport={"width": 390, "height": 780})  # fmt: skip
    tab.expected = ("404",)
    page = tab.open()
    tab.say("x" * 200)
    for name in NAMES:
        tab.tab(name)
        page.wait_for_timeout(100)
        for box in ("document.documentElement", "document.querySelector('main')"):
            assert page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth"), (name, box)
    tab.tab("Chat")
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("0.5")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Temperature")).to_have_count(0)


def test_by_keyboard_alone(serve: Serve, open_tab: Open) -> None:
    """From the first Tab: skip to the content, write, send, and reach what stands below the reply."""
    tab = open_tab(serve(make_app()).url)
    page = tab.open()
    expect(page.get_by_role("button", name="Model: fake, ready", exact=True)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_have_text("One line\nand another")
    tab.ended()
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.innerText") == "Same again":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_text("The same again, to the bit")).to_be_visible()
    page.get_by_role("button", name="Model: fake, ready", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("group", name="Models")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Model: fake, ready", exact=True)).to_be_focused()


def test_everything_that_can_be_pressed_has_a_name(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(make_app()).url)
    tab.expected = ("404",)
    page = tab.open()
    tab.say("Hi")
    page.get_by_role("button", name="Settings", exact=True).click()
    for name in NAMES:
        tab.tab(name)
        page.wait_for_timeout(100)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, a, input, textarea, select")]
              .filter((one) => !(one.getAttribute("aria-label") || one.innerText?.trim() || one.labels?.length))
              .map((one) => one.outerHTML)"""
        )
        assert nameless == [], name
