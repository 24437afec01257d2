"""What the page does with a reply in a real browser: its seed, tokens, receipt, fingerprint, request; the machine."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Tab, expect
from fakes import FakeEngine, make_app, word_by_word
from page_server import PageServer, Real

Open = Callable[..., Tab]
Serve = Callable[[Any], PageServer]


def short(tab: Tab, tokens: int = 8) -> None:
    """Have replies end after some tokens: the test's model talks nonsense for ever."""
    page = tab.page
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Close the settings", exact=True).click()


# -- seed --------------------------------------------------------------------------------------------------------------


def test_same_again_and_next_seed(real: Real, open_tab: Open) -> None:
    tab = open_tab(real.url)
    page = tab.open()
    short(tab)
    page.get_by_label("Seed", exact=True).fill("9223372036854775806")
    tab.say("Hello")
    expect(page.locator(".reply-foot")).to_contain_text("seed 9223372036854775806")
    page.get_by_role("button", name="Same again", exact=True).click()
    expect(page.get_by_text("The same again, to the bit")).to_contain_text("8 tokens")
    first = page.locator(".reply .prose").inner_text()
    page.get_by_role("button", name="Next seed").click()
    tab.ended()
    expect(page.locator(".reply-foot")).to_contain_text("seed 9223372036854775807")
    assert page.locator(".reply .prose").inner_text() != first
    page.get_by_role("button", name="Earlier branch").click()
    assert page.locator(".reply .prose").inner_text() == first


def test_the_first_difference_is_shown(serve: Serve, open_tab: Open) -> None:
    """A server that breaks the law: its third word is another one the second time."""
    words = ["two", "three"]
    engine = FakeEngine(lambda request: word_by_word("One ", "and ", words.pop(0))(request))
    tab = open_tab(serve(make_app(engine)).url)
    page = tab.open()
    tab.say("Count")
    page.get_by_role("button", name="Same again", exact=True).click()
    # the fake's ids are the places of its words: the text differs, and nothing else
    tab.ended()
    expect(page.locator(".reply .notice")).to_contain_text("Not the same")
    expect(page.locator(".reply .notice")).to_contain_text("three")


def test_several_side_by_side(real: Real, open_tab: Open) -> None:
    tab = open_tab(real.url)
    page = tab.open()
    short(tab)
    page.get_by_label("Seed", exact=True).fill("40")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="3 side by side").click()
    tab.ended()
    seeds = [text.split("·")[0].split()[1] for text in page.locator(".beside-one .origin").all_inner_texts()]
    assert [seed[:2] for seed in seeds] == ["40", "41", "42"]
    second = page.locator(".beside-one .prose").nth(1).inner_text()
    page.get_by_role("button", name="Go on with this one").nth(1).click()
    expect(page.locator(".beside-one")).to_have_count(0)
    assert page.locator(".reply .prose").inner_text() == second
    expect(page.locator(".message.assistant .branches")).to_contain_text("2/3")


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_their_rivals_and_margins(real: Real, open_tab: Open) -> None:
    tab = open_tab(real.url)
    page = tab.open()
    short(tab)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed", exact=True).fill("3")
    tab.say("Hello")
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".token")).to_have_count(8)
    page.locator(".token").nth(2).hover()
    detail = page.get_by_label("The token")
    expect(detail).to_contain_text("3 · id")
    expect(detail).to_contain_text("Margin")
    assert detail.locator(".rivals tbody tr").count() in (5, 6), "five rivals, the token itself among them or not"
    page.get_by_role("button", name="Add processed probabilities").click()
    expect(detail.locator("thead")).to_contain_text("processed")
    shares = detail.locator(".rivals tbody tr").first.locator(".share").all_inner_texts()
    assert shares[0] != shares[1], "a temperature of 0.5 changes what is drawn from"


def test_tokens_by_keyboard(real: Real, open_tab: Open) -> None:
    tab = open_tab(real.url)
    page = tab.open()
    short(tab, 5)
    tab.say("Hello")
    page.get_by_role("button", name="Tokens").click()
    page.mouse.move(0, 0)  # a token that comes to lie under the pointer is chosen
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token[aria-selected=true]")).to_have_attribute("data-at", "2")
    expect(page.locator(".token[aria-selected=true]")).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_label("The token")).to_contain_text("5 · id")


def test_going_on_from_a_token(real: Real, open_tab: Open) -> None:
    """From the same token with the same seed the rest is the same; with a rival in its place it is another reply."""
    tab = open_tab(real.url)
    page = tab.open()
    short(tab, 10)
    page.get_by_label("Seed", exact=True).fill("11")
    tab.say("Hello")
    whole = page.locator(".reply .prose").inner_text()
    page.get_by_role("button", name="Tokens").click()
    page.locator(".token").nth(3).click()
    page.get_by_role("button", name="Go on from here").click()
    tab.ended()
    expect(page.locator(".branches").last).to_contain_text("2/2")
    assert page.locator(".reply .prose").inner_text() == whole
    page.get_by_role("button", name="Same again", exact=True).click()
    expect(page.get_by_text("The same again, to the bit")).to_contain_text("6 tokens")
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".token.given")).to_have_count(4)
    expect(page.locator(".token:not(.given)")).to_have_count(6)
    page.locator(".token:not(.given)").nth(1).click()
    page.get_by_role("button", name="instead and go on").first.click()
    tab.ended()
    expect(page.locator(".branches").last).to_contain_text("3/3")
    assert page.locator(".reply .notice.error").count() == 0
    assert page.locator(".reply .prose").inner_text() != whole


# -- receipts ----------------------------------------------------------------------------------------------------------


def test_a_receipt_is_saved_verified_replayed_and_refuted(real: Real, open_tab: Open, tmp_path: Path) -> None:
    tab = open_tab(real.url)
    page = tab.open()
    short(tab)
    page.get_by_label("Seed", exact=True).fill("9223372036854775807")
    tab.say("Hello")
    page.get_by_role("button", name="Receipt").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    file = tmp_path / "receipt.json"
    download.value.save_as(file)
    page.get_by_label("A receipt's file").set_input_files(file)
    panel = page.locator(".panel", has=page.get_by_role("heading", name="receipt.json"))
    expect(panel).to_contain_text("9223372036854775807")
    expect(panel).to_contain_text("of this server")
    panel.get_by_role("button", name="Verify").click()
    expect(panel.locator(".report")).to_contain_text("identical: all 8 tokens")
    panel.get_by_role("button", name="Replay").click()
    expect(panel.locator(".report")).to_contain_text("identical")
    forged = tmp_path / "forged.json"
    forged.write_bytes(forge(json.loads(file.read_text()), 3))
    page.get_by_label("A receipt's file").set_input_files(forged)
    compared = page.locator(".panel", has=page.get_by_role("heading", name="Compared"))
    expect(compared).to_contain_text("token choice 0, token 4")  # before it is there, the panels below it move
    panel = page.locator(".panel", has=page.get_by_role("heading", name="forged.json"))
    panel.get_by_role("button", name="Verify").click()
    expect(panel.locator(".report")).to_contain_text("refuted")
    expect(panel.locator(".report")).to_contain_text("First difference at token 4")
    expect(panel.locator("mark")).not_to_be_empty()
    expect(compared.locator("mark")).to_have_count(2)


def forge(receipt: dict[str, Any], at: int) -> bytes:
    """Put another token into a receipt, with digests that fit."""
    import hashlib
    import struct

    import rfc8785

    choice = receipt["choices"][0]
    choice["token_ids"][at] = (choice["token_ids"][at] + 1) % 100 + 300
    ids = choice["token_ids"]
    choice["sha256"] = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    del receipt["digest"]
    receipt["digest"] = hashlib.sha256(rfc8785.dumps(receipt)).hexdigest()
    return rfc8785.dumps(receipt)


def test_a_file_can_be_dropped(real: Real, open_tab: Open) -> None:
    page = open_tab(real.url).open("/#/receipts")
    expect(page.locator(".drop")).to_be_visible()
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(["{}"], "nothing.json"));
          document.querySelector(".drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }"""
    )
    expect(page.get_by_role("alert")).to_have_text("nothing.json is no receipt, and no reply with one in it.")


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_and_what_differs_from_another(real: Real, open_tab: Open) -> None:
    told = httpx.get(f"{real.url}/v1/models/test").json()
    page = open_tab(real.url).open("/#/fingerprint")
    expect(page.get_by_role("heading", name="Fingerprint", exact=True)).to_be_visible()
    expect(page.locator(".fingerprint")).to_have_text(told["system_fingerprint"])
    expect(page.locator(".parts tr")).to_have_count(len(told["fingerprint_parts"]) + len(told["default_parts"]))
    expect(page.locator(".checks li")).to_have_count(len(told["reproducible"]["checks"]))
    field = page.get_by_label("Another fingerprint")
    field.fill(json.dumps(told))
    expect(page.get_by_text("All parts are the same.")).to_be_visible()
    other = {**told, "fingerprint_parts": {**told["fingerprint_parts"], "torch": "1.0"}}
    field.fill(json.dumps({"object": "list", "data": [other]}))
    row = page.locator(".differences tbody tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("torch")
    expect(row).to_contain_text("1.0")
    field.fill("{}")
    expect(page.get_by_role("alert")).to_contain_text("This holds no fingerprint_parts")


# -- request -----------------------------------------------------------------------------------------------------------


def test_the_request_as_programs(real: Real, open_tab: Open) -> None:
    """What one copies is run, and gives the reply again."""
    tab = open_tab(real.url)
    page = tab.open()
    short(tab)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Further fields").fill('{"top_k": 7, "no_such_field": 1}')
    text = 'It\'s "quoted" \\ ${x}\nand two lines'
    tab.say("x")
    page.get_by_role("button", name="Edit", exact=True).last.click()
    page.get_by_label("Another wording").fill(text)
    page.get_by_role("button", name="Send as a branch", exact=True).click()
    tab.ended()
    expect(page.get_by_text("and ignored it: no_such_field")).to_be_visible()
    reply = page.locator(".reply .prose").inner_text()
    page.get_by_role("button", name="Request", exact=True).click()
    expect(page.get_by_text("Ignored by the server, which does not know: no_such_field")).to_be_visible()
    row = page.get_by_role("row", name="top_k 7 the request")
    expect(row).to_be_visible()
    expect(page.get_by_role("row", name="seed")).to_contain_text("drawn by the server")
    code = page.locator(".code pre")
    command = code.inner_text()
    got = subprocess.run(["bash", "-c", command], capture_output=True, timeout=30, check=True).stdout
    message = json.loads(got)["choices"][0]["message"]
    assert message["content"].split() == reply.split() or reply.split()[0] in message["content"]
    assert json.loads(shlex.split(command)[-1])["messages"][-1]["content"] == text
    page.get_by_role("button", name="Python").click()
    calls = [node for node in ast.walk(ast.parse(code.inner_text())) if isinstance(node, ast.Call)]
    create = next(call for call in calls if getattr(call.func, "attr", "") == "create")
    given = {word.arg: ast.literal_eval(word.value) for word in create.keywords}
    assert given["messages"][-1]["content"] == text
    assert given["extra_body"]["top_k"] == 7
    page.get_by_role("button", name="JavaScript").click()
    expect(code).to_contain_text("await fetch(")
    page.get_by_role("button", name="JSON").click()
    assert json.loads(code.inner_text())["messages"][-1]["content"] == text


# -- machine -----------------------------------------------------------------------------------------------------------


def test_a_server_without_machine_says_so(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(make_app()).url)
    tab.expected = ("404",)
    page = tab.open()
    page.route("**/v1/machine", lambda route: route.fulfill(status=404, body="{}"))
    tab.tab("Machine")
    expect(page.get_by_text("This server has no /v1/machine")).to_be_visible()


MACHINE = {
    "object": "machine", "version": "9.9", "uptime_seconds": 3700.5, "may_manage": True,
    "machine": {
        "processor": "A Processor", "cores": 12, "memory_bytes": 64 << 30, "free_memory_bytes": 48 << 30, "gpus": ["H"]
    },
    "models": [{
        "id": "fake", "state": "ready", "detail": "ready", "memory_bytes": 3 << 30, "device": "cpu",
        "system_fingerprint": "vb-1", "reproducible": {"holds": True, "reason": "x"}, "running": 3, "waiting": 14,
        "preemptions": 0, "cache": {"usage": 0.25, "used_blocks": 2, "blocks": 8, "tokens": 4096},
        "prompt_tokens_per_second": 159.5, "generation_tokens_per_second": 41.25, "prompt_tokens": 400,
        "cached_tokens": 100, "generation_tokens": 7000
    }],
    "server": {"requests_active": 2, "requests": 99, "connections": 5, "max_connections": 1024, "refusals": []},
}  # fmt: skip


def test_the_machine(serve: Serve, open_tab: Open) -> None:
    page = open_tab(serve(make_app()).url).open()
    page.route("**/v1/machine", lambda route: route.fulfill(json=MACHINE))
    page.goto(page.url.split("#")[0] + "#/machine")
    for name, value in [
        ("Running", "3"), ("Waiting", "14"), ("Tokens/s", "41.3"), ("Memory", "3.0 GiB"), ("Memory in use", "16.0 GiB"),
        ("Cores", "12"), ("Requests now", "2"),
    ]:  # fmt: skip
        tile = page.locator(".tile", has=page.get_by_text(name, exact=True))
        expect(tile.locator(".tile-value")).to_have_text(value)
    expect(page.get_by_text("25.0 % of prompts found")).to_be_visible()


@pytest.mark.parametrize("manage", [False, True])
def test_keys_are_asked_for_kept_for_the_session_and_their_usage_shown(
    serve: Serve, open_tab: Open, tmp_path: Path, manage: bool
) -> None:
    import time

    from server.accounts.charging import Meter
    from server.ledger.store import Ledger

    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", time.time)
    secret = ledger.create_key("ada", balance=10_000).secret
    meter = Meter(ledger, {}, time.time)
    try:
        tab = open_tab(serve(make_app(FakeEngine(), meter=meter)).url)
        tab.expected = ("401", "404")
        page = tab.open()
        expect(page.get_by_role("heading", name="This server needs a key")).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).to_have_count(0)
        page.get_by_label("Key", exact=True).fill("vb-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("not known here")
        page.get_by_label("Key", exact=True).fill(secret)
        page.keyboard.press("Enter")
        tab.say("Hi")
        expect(page.locator(".reply")).to_contain_text("Hello wörld!")
        page.reload()
        expect(page.get_by_role("button", name="Model: fake, ready", exact=True)).to_be_visible()
        if manage:
            keys = [
                {"id": "k", "name": "bob", "state": "good", "admin": True, "balance": None, "usage": {"requests": 7}}
            ]
            page.route("**/v1/machine", lambda route: route.fulfill(json=MACHINE))
            page.route("**/v1/keys", lambda route: route.fulfill(json={"data": keys}))
        tab.tab("Machine")
        expect(page.get_by_role("heading", name="The key ada")).to_be_visible()
        expect(page.get_by_role("row", name="fake")).to_contain_text("9")
        if manage:
            expect(page.get_by_role("row", name="bob")).to_contain_text("7")
        stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert secret not in stored[0]
        assert secret in stored[1]
        assert not any(secret in url for url in tab.requests)
        page.get_by_role("button", name="Forget the key").click()
        expect(page.get_by_role("heading", name="This server needs a key")).to_be_visible()
        assert secret not in page.evaluate("JSON.stringify(sessionStorage)")
    finally:
        meter.close()
