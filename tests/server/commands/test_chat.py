"""`verbatim chat`: what is shown, what /again promises, and that nothing of a model's text controls a terminal."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine import ConfigError, SamplingParams, Unavailable, VerbatimError
from server.commands.chat.remote import RemoteTalker
from server.commands.chat.screen import Screen
from server.commands.chat.session import Session
from server.commands.chat.talker import Message, Piece, Reply, Replying, difference


class Scripted:
    """Says its words, and remembers what it was asked. `drift`: the second time it says something else."""

    name, fingerprint = "scripted", "vb-1"

    def __init__(self, *words: str, drift: bool = False, thoughts: str = "") -> None:
        self.words, self.drift, self.thoughts = words, drift, thoughts
        self.asked: list[tuple[tuple[Message, ...], int | None]] = []

    def reply(self, messages: Sequence[Message], seed: int | None) -> Replying:
        if "refuse" in messages[-1].content:
            raise ConfigError("the prompt has 70 tokens; this model's context holds 64.")
        self.asked.append((tuple(messages), seed))
        if self.thoughts:
            yield Piece(self.thoughts, thought=True)
        logprob = -0.5 - (len(self.asked) if self.drift else 0)
        for word in self.words:
            yield Piece(word)
            if word == "stop here":
                raise KeyboardInterrupt
        tokens = tuple((word, logprob) for word in self.words)
        used = 41 if seed is None else seed
        return Reply("".join(self.words), self.thoughts, used, "vb-1", tokens, len(tokens), "stop")

    def close(self) -> None:
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(talker: Scripted, text: str, *, out: io.StringIO | None = None) -> tuple[str, str, Session]:
    """What a conversation prints to standard output and standard error."""
    said, err = out or io.StringIO(), io.StringIO()
    session = Session(talker, Screen(io.StringIO(text), said, err), clock=iter(range(1000)).__next__)
    session.run()
    return said.getvalue(), err.getvalue(), session


def test_again_replays_the_same_request_with_the_drawn_seed() -> None:
    talker = Scripted("a", "b")
    out, err, session = talk(talker, "hello\n/again\n")
    assert out == "ab\nab\n", "standard output has the replies and nothing else"
    assert talker.asked == [((Message("user", "hello"),), None), ((Message("user", "hello"),), 41)]
    assert "seed 41 · vb-1 · 2 tokens" in err
    assert "✓ same bits: 2 tokens and their log-probabilities" in err
    assert not session.failed


def test_again_says_where_bits_differ() -> None:
    _, err, session = talk(Scripted("a", drift=True), "hello\n/again\n")
    assert "✗ the log-probability of token 1, 'a', was -1.5 and is -2.5" in err
    assert session.failed, "a script sees it in the exit code"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"tokens": (("a", -1.0), ("b", -1.0))}, {"tokens": (("a", -1.0), ("c", -1.0))}, "token 2 was 'b' and is 'c'"),
        ({"tokens": (("a", -1.0),)}, {"tokens": ()}, "there were 1 tokens and are 0"),
        ({"ids": (1,)}, {"ids": (2,)}, "the replies differ"),
        ({"fingerprint": "vb-1"}, {"fingerprint": "vb-2"}, "the fingerprint was vb-1 and is vb-2"),
        ({}, {}, None),
    ],
)
def test_the_first_difference(first: dict[str, Any], second: dict[str, Any], words: str | None) -> None:
    plain = {"text": "", "thoughts": "", "seed": 1, "fingerprint": "", "tokens": (), "completion_tokens": 0}
    made = [Reply(**{**plain, "finish_reason": "stop", **given}) for given in (first, second)]
    found = difference(made[0], made[1])
    assert found is None if words is None else words in str(found)


def test_commands_shape_what_is_asked() -> None:
    talker = Scripted("x")
    _, err, _ = talk(talker, "/seed 7\n/system be brief\none\n//two\n/new\n/seed\n/system\nthree\n")
    (first, seven), (second, _), (third, none) = talker.asked
    assert (seven, none) == (7, None)
    assert [m.content for m in first] == ["be brief", "one"]
    assert [(m.role, m.content) for m in second[1:]] == [("user", "one"), ("assistant", "x"), ("user", "/two")]
    assert [m.content for m in third] == ["three"]
    assert err.count("seed 7") == 3


def test_messages_of_several_lines() -> None:
    talker = Scripted("x")
    talk(talker, 'one\\\ntwo\n"""three\n\nfour\n"""\n"""five"""\n"""never ended\nsix')
    assert [asked[0][-1].content for asked in talker.asked] == ["one\ntwo", "three\n\nfour", "five", "never ended\nsix"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("/nonsense", "there is no command /nonsense"),
        ("/seed x", "unlike 'x'"),
        (f"/seed {2**64}", f"not {2**64}"),
        ("/again", "no reply yet"),
        ("/save", "needs the name"),
        ("/save /no/such/folder/x", "/no/such/folder/x cannot be written: No such file"),
        ("refuse", "70 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(said: str, words: str) -> None:
    talker = Scripted("x")
    out, err, session = talk(talker, f"{said}\nhello\n")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert line.endswith(".")
    assert not line.endswith("..")
    assert out == "x\n"
    assert [m.content for m in talker.asked[-1][0]] == ["hello"], "the refused message is forgotten"
    assert session.failed


def test_an_interrupted_reply_is_forgotten() -> None:
    talker = Scripted("stop here")
    _, err, _ = talk(talker, "one\ntwo\n")
    assert "interrupted" in err
    assert [m.content for m in talker.asked[-1][0]] == ["two"]


def test_no_text_of_a_model_controls_a_terminal() -> None:
    """A model says what its prompt makes it say; a title, a colour or a cursor movement stays visible text."""
    evil = "\x1b]0;owned\x07\x1b[2Jx\u202ey\x9b1m"
    terminal = Terminal()
    out, err, _ = talk(Scripted(evil, thoughts=evil), "hello\n", out=terminal)
    left = out.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert all(character.isprintable() or character == "\n" for character in left)
    assert "\\x1b]0;owned" in left
    assert "\x1b" not in err


def test_thoughts_are_dimmed_on_a_terminal_and_left_out_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, _, _ = talk(Scripted("answer", thoughts="hm"), "hello\n", out=Terminal())
    assert shown == "\x1b[2mhm\n\x1b[0manswer\n"
    piped, _, _ = talk(Scripted("answer", thoughts="hm"), "hello\n")
    assert piped == "answer\n"


def test_a_saved_conversation_has_what_it_can_be_had_again_with(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    _, err, _ = talk(Scripted("x"), f"/system s\nhello\n/save {file}\n/save {file}\n")
    document = json.loads(file.read_text())
    assert [m["content"] for m in document["messages"]] == ["s", "hello", "x"]
    assert (document["messages"][2]["seed"], document["messages"][2]["system_fingerprint"]) == (41, "vb-1")
    assert f"{file} exists, and is not overwritten." in err


# -- a server ----------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers a list of two models, and streams what `said` holds."""

    said: tuple[bytes, ...] = ()
    asked: list[tuple[str, Any, str | None]] = []

    def do_GET(self) -> None:
        models = [{"id": "one", "state": "loading"}, {"id": "two", "state": "ready", "system_fingerprint": "vb-2"}]
        self._answer(200, json.dumps({"data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, body, self.headers.get("Authorization")))
        if body["messages"][-1]["content"] == "refuse":
            self._answer(422, b'{"error": {"message": "temperature must be at most 2, not 3."}}')
        else:
            self._answer(200, b"".join(self.said))

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def event(delta: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None, **more.pop("choice", {})}
    return (
        b"data: "
        + json.dumps({"seed": 9, "system_fingerprint": "vb-2", "choices": [choice], **more}).encode()
        + b"\n\n"
    )


_TOKEN = {"logprobs": {"content": [{"token": "hi", "logprob": -0.25}]}}
_STREAM = (
    b": keep-alive\n\n",
    event({"role": "assistant", "content": ""}),
    event({"reasoning_content": "hm"}),
    event({"content": "hi"}, choice=_TOKEN),
    event({}, choice={"finish_reason": "length"}),
    b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n',
    b"data: [DONE]\n\n",
)


def collected(replying: Replying) -> tuple[list[Piece], Reply]:
    pieces = []
    while True:
        try:
            pieces.append(next(replying))
        except StopIteration as end:
            return pieces, end.value


def test_a_reply_from_a_server(server: str) -> None:
    Server.said = _STREAM
    talker = RemoteTalker(server + "/v1/", "secret", None, {"max_tokens": 5})
    assert (talker.name, talker.fingerprint) == ("two", "vb-2"), "the first that is ready"
    pieces, reply = collected(talker.reply([Message("user", "hello")], 9))
    assert pieces == [Piece("hm", thought=True), Piece("hi")]
    assert reply == Reply("hi", "hm", 9, "vb-2", (("hi", -0.25),), 3, "length")
    [(path, body, key)] = Server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["seed"], body["max_tokens"], body["logprobs"]) == ("two", 9, 5, True)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (_STREAM[:4], "broke the reply off."),
        ((*_STREAM[:3], b'data: {"error": {"message": "out of memory."}}\n\n'), "ended the reply: out of memory."),
        ((b"data: {nonsense\n\n",), "cannot be asked"),
    ],
)
def test_a_stream_that_ends_badly_is_told(server: str, said: tuple[bytes, ...], words: str) -> None:
    Server.said = said
    with pytest.raises(Unavailable) as caught:
        collected(RemoteTalker(server, None, "two", {}).reply([Message("user", "hello")], None))
    assert words in caught.value.message
    assert caught.value.message.endswith(".")


def test_what_a_server_refuses_is_told_in_its_words(server: str) -> None:
    talker = RemoteTalker(server, None, "two", {})
    with pytest.raises(VerbatimError, match=r"answers 422: temperature must be at most 2, not 3\."):
        collected(talker.reply([Message("user", "refuse")], None))


@pytest.mark.parametrize(
    ("url", "model", "words"),
    [
        ("ftp://x", None, "unlike 'ftp://x'"),
        ("http://127.0.0.1:9", None, "cannot be asked"),
        (None, "three", "'three'"),
    ],
)
def test_a_server_that_cannot_be_talked_to(server: str, url: str | None, model: str | None, words: str) -> None:
    with pytest.raises(VerbatimError) as caught:
        RemoteTalker(url or server, None, model, {})
    assert words in caught.value.message


def test_a_real_model_says_the_same_again(tiny: Any) -> None:
    """The law, as a person sees it: a drawn seed, and the same bits."""
    from engine import LLM
    from server.commands.chat.local import LocalTalker

    llm = LLM(tiny("qwen3"), cache_size="8MiB", threads=1)
    talker = LocalTalker(llm, {"max_tokens": 12})
    err = io.StringIO()
    session = Session(talker, Screen(io.StringIO("Say something\n/again\n"), io.StringIO(), err))
    session.run()
    talker.close()
    assert "✓ same bits: 12 tokens" in err.getvalue()
    assert llm.info.system_fingerprint in err.getvalue()
    assert not session.failed
    assert SamplingParams().seed is None
