"""The chat in a real browser: streaming, stop, thoughts, tools, branches, history; models and servers come and go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from browsing import Tab, expect
from fakes import INFO, FakeEngine, FakeRegistry, Step, make_app, output, word_by_word
from page_server import PageServer, Real

from engine import ChoiceDelta, ModelStatus, PreparedRequest
from server.app import create_app

Open = Callable[..., Tab]
Serve = Callable[[Any], PageServer]


def says(*words: str) -> FakeEngine:
    return FakeEngine(word_by_word(*words))


def test_a_conversation(serve: Serve, open_tab: Open) -> None:
    """A reply streams in, with its seed and its fingerprint below; the model knows what was said before."""
    engine = says("Hel", "lo", " there")
    tab = open_tab(serve(make_app(engine)).url)
    page = tab.open()
    tab.say("Hi")
    expect(page.locator(".reply")).to_contain_text("Hello there")
    expect(page.locator(".reply-foot")).to_contain_text("seed 77")
    expect(page.locator(".reply-foot")).to_contain_text("fp_fake")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("77")
    expect(page.get_by_role("heading", name="Hi")).to_be_visible()
    tab.say("And again")
    said = [(one.role, one.content) for one in engine.requests[-1].messages or ()]
    assert said == [("user", "Hi"), ("assistant", "Hello there"), ("user", "And again")]
    assert engine.requests[-1].sampling.get("seed") is None, "the next one draws a new seed"


def test_stop(serve: Serve, open_tab: Open) -> None:
    def endless(request: PreparedRequest) -> Iterable[Step]:
        for i in range(10_000):
            yield output(request, [ChoiceDelta(0, f"word{i} ", (i,))], i + 1)
            yield 0.01

    engine = FakeEngine(endless)
    tab = open_tab(serve(make_app(engine)).url)
    page = tab.open()
    tab.begin("Go on for ever")
    expect(page.locator(".reply.live")).to_contain_text("word3")
    page.get_by_role("button", name="Stop", exact=True).click()
    tab.ended()
    expect(page.locator(".reply-foot")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Same again", exact=True)).to_have_count(0)
    page.wait_for_function("() => true")
    assert not engine.open, "the server computes no further"


def test_thoughts_and_calls_stand_apart(real: Real, open_tab: Open) -> None:
    """The user defines a tool, the model calls it, the user answers, the model goes on."""
    tab = open_tab(real.url)
    page = tab.open()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Put in an example").click()
    page.get_by_role("button", name="Close the settings", exact=True).click()
    real.say(call="weather", arguments={"city": "Rome"}, thoughts="I should ask.", text="It is sunny.")
    tab.say("How is the weather in Rome?")
    reply = page.locator(".reply").last
    expect(reply.locator(".call")).to_contain_text("weather")
    expect(reply.locator(".call code")).to_have_text('{\n  "city": "Rome"\n}')
    expect(reply.locator("summary")).to_have_text("Thoughts")
    expect(reply.get_by_text("I should ask.")).to_be_hidden()
    reply.locator("summary").click()
    expect(reply.get_by_text("I should ask.")).to_be_visible()
    page.get_by_label("What weather answers").fill("sunny, 31 degrees")
    page.get_by_role("button", name="Answer the call").click()
    tab.ended()
    expect(page.locator(".message.tool")).to_contain_text("sunny, 31 degrees")
    expect(page.locator(".reply").last).to_contain_text("It is sunny.")


def test_editing_makes_a_branch(serve: Serve, open_tab: Open) -> None:
    engine = says("Yes", "!")
    tab = open_tab(serve(make_app(engine)).url)
    page = tab.open()
    tab.say("First wording")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Another wording").fill("Second wording")
    page.get_by_role("button", name="Send as a branch", exact=True).click()
    tab.ended()
    assert [one.content for one in engine.requests[-1].messages or ()] == ["Second wording"]
    expect(page.locator(".said")).to_have_text("Second wording")
    page.get_by_role("button", name="Earlier branch").first.click()
    expect(page.locator(".said")).to_have_text("First wording")
    expect(page.locator(".branches").first).to_contain_text("1/2")


def test_history_stays_in_the_browser(serve: Serve, open_tab: Open, tmp_path: Path) -> None:
    """It survives a reload, can be carried to another browser, and can be deleted."""
    server = serve(make_app(says("An", "swer")))
    tab = open_tab(server.url)
    page = tab.open()
    tab.say("Remember this")
    page.wait_for_timeout(600)  # it is written a moment later
    page.reload()
    page.get_by_role("button", name="Remember this", exact=True).click()
    expect(page.locator(".reply")).to_contain_text("Answer")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    assert json.loads(file.read_text())["format"] == "verbatim-conversations"
    other = open_tab(server.url)
    there = other.open()
    there.get_by_label("A file of conversations").set_input_files(file)
    there.get_by_role("button", name="Remember this", exact=True).click()
    expect(there.locator(".reply-foot")).to_contain_text("seed 77")
    there.get_by_label("A file of conversations").set_input_files({
        "name": "x.json", "mimeType": "application/json", "buffer": b'{"format": "another"}'
    })  # fmt: skip
    expect(there.get_by_role("alert")).to_contain_text("no file of conversations")
    page.get_by_role("button", name="Delete all", exact=True).click()
    page.get_by_role("button", name="Delete all for good").click()
    page.reload()
    expect(page.get_by_role("button", name="Remember this", exact=True)).to_have_count(0)


def test_a_refusal_is_told_in_the_servers_words(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(make_app(FakeEngine())).url)
    tab.expected = ("422",)
    page = tab.open()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("9")
    tab.say("Hi")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    page.get_by_label("Temperature").fill("warm")
    tab.begin("Hi")
    expect(page.get_by_role("alert").last).to_contain_text("temperature is warm, which is no number")


# -- models and servers that come and go -------------------------------------------------------------------------------


def test_a_model_that_loads(serve: Serve, open_tab: Open) -> None:
    registry: Any = FakeRegistry(ModelStatus("fake", "loading", "reading the weights"))
    tab = open_tab(serve(create_app(registry)).url)
    page = tab.open()
    expect(page.get_by_role("button", name="Model: fake, loading", exact=True)).to_be_visible()
    registry.entries["fake"] = FakeEngine()
    expect(page.get_by_role("button", name="Model: fake, ready", exact=True)).to_be_visible()
    tab.say("Hi")
    expect(page.locator(".reply")).to_contain_text("Hello wörld!")


def test_models_are_chosen_loaded_and_unloaded(serve: Serve, open_tab: Open) -> None:
    import dataclasses

    other = FakeEngine(info=dataclasses.replace(INFO, id="other"))
    tab = open_tab(serve(make_app(FakeEngine(), other, ModelStatus("cold", "unloaded", "on demand"))).url)
    page = tab.open()
    asked = []

    def answer(route: Any) -> None:
        asked.append((route.request.method, route.request.url.removeprefix(tab.url)))
        route.fulfill(status=200, content_type="application/json", body="{}")

    page.route("**/load", answer)
    page.route("**/unload", answer)
    page.get_by_role("button", name="Model: fake, ready", exact=True).click()
    page.get_by_role("button", name="Load cold", exact=True).click()
    page.get_by_role("button", name="Unload other", exact=True).click()
    page.wait_for_function("() => true")
    assert asked == [("POST", "/v1/models/cold/load"), ("POST", "/v1/models/other/unload")]
    page.locator(".model-choice", has_text="other").click()
    tab.say("Hi")
    assert len(other.requests) == 1


def test_a_server_that_stops_and_comes_back(serve: Serve, open_tab: Open) -> None:
    def stuck(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "Half a", (0,))], 1)
        yield None

    engine = FakeEngine(stuck)
    server = serve(make_app(engine))
    tab = open_tab(server.url)
    tab.expected = ("ERR_", "Failed to load resource")
    page = tab.open()
    tab.begin("Hi")
    expect(page.locator(".reply")).to_contain_text("Half a")
    server.stop()
    tab.ended()
    expect(page.locator(".reply").get_by_role("alert")).to_contain_text("The connection ended before the reply did.")
    expect(page.get_by_text("The server does not answer. Trying again")).to_be_visible()
    engine.script, engine.open = word_by_word("Back"), {}
    server.start()
    expect(page.get_by_text("The server does not answer. Trying again")).to_have_count(0)
    tab.say("Are you there?")
    expect(page.locator(".reply").last).to_contain_text("Back")


def test_the_demo_model_offers_a_real_one(serve: Serve, open_tab: Open) -> None:
    import dataclasses

    demo = FakeEngine(info=dataclasses.replace(INFO, id="demo"))
    page = open_tab(serve(make_app(demo)).url).open()
    expect(page.get_by_text("verbatim models get smollm2")).to_be_visible()
    expect(page.get_by_role("button", name="Copy the command")).to_be_visible()
    there = open_tab(serve(make_app(FakeEngine())).url).open()
    expect(there.get_by_role("button", name="Model: fake, ready", exact=True)).to_be_visible()
    expect(there.get_by_text("verbatim models get smollm2")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(serve: Serve, open_tab: Open, scheme: str) -> None:
    page = open_tab(serve(make_app()).url, color_scheme=scheme).open()

    def ground() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    assert (ground() > 128) == (scheme == "light")
    page.get_by_role("button", name="Colours: as the system").click()
    assert ground() > 128
    page.get_by_role("button", name="Colours: light").click()
    assert ground() < 128
    page.reload()
    assert ground() < 128
    expect(page.get_by_role("button", name="Colours: dark")).to_be_visible()
