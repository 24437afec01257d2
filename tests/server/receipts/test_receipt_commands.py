"""`verbatim verify`, `replay` and `diff`: verdicts as exit codes, and one sentence for whatever a stranger sends."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import (
    LLM,
    MOST_RECEIPT_BYTES,
    Receipt,
    ReceiptError,
    check_receipt,
    fingerprint_of,
    generate_key,
    load_private_key,
    read_receipt,
    sign_receipt,
)
from server import cli
from server.json_text import to_json
from server.receipts import commands, remote
from server.receipts.report import report_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The console command, in this process and in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verbatim", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(caught.value.code or 0), captured.out, captured.err

    return main


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)


@pytest.fixture(scope="module")
def receipt(llm: LLM) -> Receipt:
    found = llm.generate("every parameter is honoured", receipt=True, max_tokens=12, seed=4, ignore_eos=True)[0].receipt
    assert found is not None
    return found


@pytest.fixture
def model(llm: LLM, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the model, which is loaded once for all tests."""
    folder = tiny("qwen3")
    monkeypatch.setattr(LLM, "from_config", classmethod(lambda cls, entry, **how: llm))
    return folder


def write(path: Path, receipt: Receipt) -> Path:
    path.write_bytes(receipt.to_bytes())
    return path


def forged(receipt: Receipt) -> Receipt:
    [choice] = receipt.choices
    assert choice.token_ids is not None
    from engine.receipts.canonical import digest_of_ids

    ids = (*choice.token_ids[:5], (choice.token_ids[5] + 1) % 256, *choice.token_ids[6:])
    return dataclasses.replace(
        receipt, choices=(dataclasses.replace(choice, token_ids=ids, sha256=digest_of_ids(ids)),)
    )


@pytest.mark.parametrize("command", ["verify", "replay"])
def test_a_receipt_that_holds(run: Run, receipt: Receipt, model: Path, tmp_path: Path, command: str) -> None:
    code, out, _ = run(command, write(tmp_path / "r.json", receipt), "--model", model)
    assert code == commands.HOLDS
    assert "identical" in out
    assert "12/12" in out
    assert "all 12 tokens and 12 scores are equal in every bit." in out


def test_a_real_load(run: Run, receipt: Receipt, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, _ = run("verify", write(tmp_path / "r.json", receipt), "--model", tiny("qwen3"), "--json")
    report = json.loads(out)
    assert (code, report["verdict"], report["mode"], report["id"]) == (0, "identical", "verify", receipt.id)
    assert report["file"] == str(tmp_path / "r.json")
    assert report["choices"][0]["drawn"] == 12


def test_a_refuted_one_among_others(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    lines = [receipt.to_bytes(), b"", forged(receipt).to_bytes(), b"{}"]
    (tmp_path / "many.jsonl").write_bytes(b"\n".join(lines))
    code, out, err = run("verify", tmp_path / "many.jsonl", "--model", model)
    assert code == commands.REFUTED
    assert "many.jsonl:1" in out
    assert "refuted" in out
    assert "5: " in out  # the position
    assert "many.jsonl:4: this is JSON, but not a receipt" in err
    code, out, _ = run("verify", tmp_path / "many.jsonl", "--model", model, "--json")
    first, second, third = map(json.loads, out.splitlines())
    assert (first["verdict"], second["verdict"], third["file"]) == ("identical", "refuted", f"{tmp_path}/many.jsonl:4")
    assert "error" in third


def hostile(name: str, receipt: Receipt, folder: Path) -> Path:
    path = folder / f"{name}.json"
    document = receipt.to_json()
    if name == "missing":
        return path
    if name == "a folder":
        path.mkdir()
    elif name == "1 GB":
        with path.open("wb") as file:
            file.truncate(1 << 30)  # a sparse file
    elif name == "not JSON":
        path.write_text("<html>")
    elif name == "digest only":
        write(path, dataclasses.replace(receipt, request={"sha256": "0" * 64}, **_without_text(receipt)))
    elif name == "another sampler":
        parts = {**receipt.environment.parts, "sampler": 99}
        from engine import fingerprint_of

        environment = dataclasses.replace(receipt.environment, parts=parts, fingerprint=fingerprint_of(parts, "vb-"))
        write(path, dataclasses.replace(receipt, environment=environment))
    elif name == "another version":
        path.write_text(json.dumps({**document, "version": 7}))
    elif name == "altered":
        path.write_text(json.dumps({**document, "created": 7}))
    elif name == "a million tokens":
        document["prompt"]["token_ids"] = [1] * (1 << 20)
        path.write_text(json.dumps(document))
    elif name == "numbers beyond canonical JSON":
        path.write_text(json.dumps({**document, "created": "1e400"}).replace('"1e400"', "1e400"))
    return path


def _without_text(receipt: Receipt) -> dict[str, Any]:
    prompt = dataclasses.replace(receipt.prompt, token_ids=None)
    choices = tuple(dataclasses.replace(choice, token_ids=None, scores=None) for choice in receipt.choices)
    return {"prompt": prompt, "choices": choices}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "cannot be read: No such file or directory."),
        ("a folder", "cannot be read: Is a directory."),
        ("1 GB", "has more than 67108864 bytes"),
        ("not JSON", "the receipt is not JSON"),
        ("digest only", "holds a digest of its request"),
        ("another sampler", "by version 99 of the sampler, and this program has version 1"),
        ("another version", "the receipt has version 7; this program reads version 1"),
        ("altered", "the receipt was altered"),
        ("a million tokens", "prompt: tokens and sha256 are not those of token_ids"),
        ("numbers beyond canonical JSON", "cannot be written as canonical JSON"),
    ],
)
def test_hostile_files(run: Run, receipt: Receipt, model: Path, tmp_path: Path, name: str, words: str) -> None:
    code, out, err = run("verify", hostile(name, receipt, tmp_path), "--model", model)
    assert code == commands.NOT_CHECKED
    told = [line for line in (out + err).splitlines() if words in line]
    assert len(told) == 1


def test_a_line_without_end(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    """As much is read of a line as a receipt may have; what follows cannot be found without reading on."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(receipt.to_bytes() + b"\n")
    with path.open("r+b") as file:
        file.truncate(MOST_RECEIPT_BYTES * 3)
    code, out, err = run("verify", path, "--model", model)
    assert code == commands.NOT_CHECKED
    assert "identical" in out
    assert err.count("has more than 67108864 bytes") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--config", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--url", "ftp://x"], "--url must begin with http:// or https://"),
        (["--url", "http://x", "--model", "y"], "give either --url, or --model or --config"),
        (["--key", "nothing.pem"], "cannot read nothing.pem: No such file or directory."),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be asked: "),
    ],
)
def test_what_is_not_there(run: Run, receipt: Receipt, tmp_path: Path, arguments: list[str], words: str) -> None:
    code, _, err = run("verify", write(tmp_path / "r.json", receipt), *arguments)
    assert code == commands.NOT_CHECKED
    assert words in err
    assert err.count("error:") == 1


def test_a_configuration_with_several_models(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        f"models:\n  - {{id: demo, builtin: demo}}\n  - {{id: other, path: {model}}}\n"
    )
    path = write(tmp_path / "r.json", receipt)
    assert run("verify", path)[0] == commands.HOLDS
    (tmp_path / "models.yaml").write_text("models:\n  - {id: demo, builtin: demo}\n  - {id: noise, builtin: noise}\n")
    code, _, err = run("verify", path)
    assert code == commands.NOT_CHECKED
    assert "the configuration has no model 'qwen3'; name the receipt's model with --model." in err


def test_signatures(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        generate_key(tmp_path / name)
    envelope = sign_receipt(receipt, load_private_key(tmp_path / "mine"))
    path = tmp_path / "signed.json"
    path.write_text(json.dumps(envelope))
    code, out, _ = run("verify", path, "--model", model, "--key", tmp_path / "mine.pub")
    assert (code, "signed by " in out) == (commands.HOLDS, True)
    code, out, _ = run("verify", path, "--model", model)
    assert (code, "give --key to have the signature checked" in out) == (commands.HOLDS, True)
    code, _, err = run("verify", path, "--model", model, "--key", tmp_path / "other.pub")
    assert (code, "not signed by the key that was given" in err) == (commands.NOT_CHECKED, True)
    envelope["signatures"][0]["sig"] = "AAAA" + envelope["signatures"][0]["sig"][4:]
    path.write_text(json.dumps(envelope))
    code, _, err = run("verify", path, "--model", model, "--key", tmp_path / "mine.pub")
    assert (code, "signature does not hold" in err) == (commands.NOT_CHECKED, True)
    code, _, err = run("verify", write(path, receipt), "--model", model, "--key", tmp_path / "mine.pub")
    assert (code, "the receipt is not signed." in err) == (commands.NOT_CHECKED, True)


# -- a running server --------------------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers as the server does, and notes what was asked."""

    llm: LLM
    seen: list[tuple[str, str | None]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["Authorization"]))
        key = self.headers["Authorization"]
        if key == "Bearer moved":
            self._send(302, b"", Location="http://127.0.0.1:9/stolen")
        elif key == "Bearer wrong":
            self._send(401, b'{"error": {"message": "the key is not known."}}')
        elif key == "Bearer drops":  # byte after byte, each in time
            self.send_response(200)
            self.send_header("Content-Length", "20")
            self.end_headers()
            for _ in range(20):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif key == "Bearer noise":
            self._send(200, b"<html>")
        else:
            self._send(200, json.dumps(check_receipt(self.llm, read_receipt(body)).to_json()).encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(llm: LLM) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    answers = type("Answers", (_Answers,), {"llm": llm, "seen": []})
    with http.server.HTTPServer(("127.0.0.1", 0), answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", answers.seen
        server.shutdown()
        thread.join()


def test_a_server_checks(run: Run, receipt: Receipt, served: Any, tmp_path: Path) -> None:
    url, seen = served
    path = write(tmp_path / "r.json", receipt)
    code, out, _ = run("verify", path, "--url", f"{url}/v1", "--api-key", "sk-1", "--json")
    assert (code, json.loads(out)["verdict"]) == (commands.HOLDS, "identical")
    run("replay", path, "--url", url, "--tolerance", 0.5)
    assert seen == [("/v1/receipts/verify", "Bearer sk-1"), ("/v1/receipts/verify?mode=replay&tolerance=0.5", None)]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("wrong", "answers 401: the key is not known."),
        ("moved", "answers 302: "),
        ("noise", "the server's answer is no report about a receipt"),
    ],
)
def test_a_server_refuses(run: Run, receipt: Receipt, served: Any, tmp_path: Path, key: str, words: str) -> None:
    """No redirect is followed: it would take the key to another server."""
    code, _, err = run("verify", write(tmp_path / "r.json", receipt), "--url", served[0], "--api-key", key)
    assert (code, words in err) == (commands.NOT_CHECKED, True)


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"verdict": "splendid", "choices": []}', b"[" * 100_000, b"\xff"])
def test_an_answer_that_is_no_report(receipt: Receipt, answer: bytes) -> None:
    with pytest.raises(ReceiptError, match="no report about a receipt"):
        report_of(answer, receipt)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("id", "other", "its id is another"),
        ("digest", "0" * 64, "its digest is another"),
        ("verdict", "reproduced", "its verdict is not the worst"),
        ("choices.0.verdict", "refuted", "its verdict is not the worst"),
        ("choices", [], "it says identical, but nothing was compared"),
        ("choices", [1], "choices is not as it should be"),
        ("choices.0.verdict", 5, "choices is not as it should be"),
        ("choices.0.largest_difference", "x", "choices is not as it should be"),
        ("choices.0.drawn", True, "choices is not as it should be"),
        ("choices.0.different", 13, "more tokens than there are"),
        ("choices.0.tokens", 11, "its choices are not those of the receipt"),
        ("choices.0.first", {"position": 1}, "choices is not as it should be"),
        ("environment", 5, "environment is not as it should be"),
        ("mode", [], "mode is not as it should be"),
        ("extra", 1, "'extra' is not known"),
    ],
)
def test_an_answer_that_is_another_report(llm: LLM, receipt: Receipt, path: str, value: Any, words: str) -> None:
    report = check_receipt(llm, receipt).to_json()
    assert report_of(to_json(report).encode(), receipt) == json.loads(to_json(report))
    document = json.loads(to_json(report))
    *places, last = path.split(".")
    inner = document
    for place in places:
        inner = inner[int(place)] if isinstance(inner, list) else inner[place]
    inner[last] = value
    with pytest.raises(ReceiptError, match=words):
        report_of(to_json(document).encode(), receipt)


def test_a_server_has_a_deadline_for_the_whole_answer(
    run: Run, receipt: Receipt, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SECONDS", 0.2)
    path = write(tmp_path / "r.json", receipt)
    code, _, err = run("verify", path, "--url", served[0], "--api-key", "drops")
    assert (code, "has not answered within 0.2 seconds." in err) == (commands.NOT_CHECKED, True)


def test_a_fault_of_the_check_refutes_nothing(
    run: Run, receipt: Receipt, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **how: Any) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr("engine.check_receipt", fail)
    code, _, err = run("verify", write(tmp_path / "r.json", receipt), "--model", model)
    assert (code, "the check has failed: IndexError: out of range" in err) == (commands.NOT_CHECKED, True)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_only_regular_files_are_signed(run: Run, tmp_path: Path, name: str) -> None:
    """A pipe would be waited for, and a device read without end."""
    os.mkfifo(tmp_path / "pipe")
    generate_key(tmp_path / "mine")
    code, _, err = run("receipts", "sign", name, "--key", tmp_path / "mine")
    assert (code != 0, f"{name} is no regular file." in err) == (True, True)


# -- a reply around it -------------------------------------------------------------------------------------------


def reply_of(receipt: Receipt, **changes: Any) -> dict[str, Any]:
    [choice] = receipt.choices
    message = {"role": "assistant", "content": "I owe you a million."}
    told = {"index": 0, "message": message, "finish_reason": choice.finish_reason, "token_ids": choice.token_ids}
    return {"id": receipt.id, "choices": [{**told, **changes}], "receipt": receipt.to_json()}


def test_the_text_around_a_receipt_is_not_vouched_for(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "reply.json"
    path.write_text(json.dumps(reply_of(receipt)))
    code, out, _ = run("verify", path, "--model", model)
    assert (code, "only the receipt was checked, not the text around it" in out) == (commands.HOLDS, True)
    code, out, _ = run("verify", path, "--model", model, "--json")
    assert json.loads(out)["note"] == "only the receipt was checked, not the text around it"
    path.write_text(json.dumps({**reply_of(receipt), "choices": []}))  # the last chunk of a stream has no text
    code, out, _ = run("verify", path, "--model", model, "--json")
    assert (code, "note" in json.loads(out)) == (commands.HOLDS, False)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda r: {**reply_of(r), "id": "other"}, "the reply has the id 'other', and its receipt"),
        (lambda r: {**reply_of(r), "choices": [1]}, "the reply's choices are not numbered from 0."),
        (lambda r: {**reply_of(r), "choices": [1, 2]}, "the reply has 2 choices, and its receipt 1."),
        (lambda r: reply_of(r, index=1), "the reply's choices are not numbered from 0."),
        (
            lambda r: reply_of(r, finish_reason="stop"),
            "the finish reason of choice 0 is 'stop' in the reply, and 'length'",
        ),
        (lambda r: reply_of(r, token_ids=[1]), "choice 0 has other token ids in the reply than in its receipt."),
        (lambda r: reply_of(r, token_ids=["x"]), "choice 0 has other token ids in the reply than in its receipt."),
        (
            lambda r: {**reply_of(r), "receipt": None, "receipts": [r.to_json()] * 2},
            "1 choices, and its receipt 1 for each",
        ),
    ],
)
def test_a_receipt_of_another_reply(
    run: Run, receipt: Receipt, model: Path, tmp_path: Path, reply: Callable[[Receipt], Any], words: str
) -> None:
    path = tmp_path / "reply.json"
    path.write_text(json.dumps(reply(receipt)))
    code, _, err = run("verify", path, "--model", model)
    assert code == commands.NOT_CHECKED
    assert "the receipt is not that of the reply around it: " in err
    assert words in err


# -- hostile text ------------------------------------------------------------------------------------------------

LIE = "x\nreceipt.json\r\n  all 12 tokens and 12 scores are equal in every bit.\x1b[2J\x85\u2028[bold]\u202e"


def told_lies(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(("all 12 tokens and", "receipt.json"))]


def test_no_text_from_outside_ends_a_line(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    """Otherwise a receipt could print lines that look like the verdict."""
    parts = {**receipt.environment.parts, LIE: LIE}
    environment = dataclasses.replace(receipt.environment, parts=parts, fingerprint=fingerprint_of(parts, "vb-"))
    elsewhere = dataclasses.replace(receipt, id=LIE, environment=environment)
    path, honest = write(tmp_path / "r.json", elsewhere), write(tmp_path / "h.json", receipt)
    code, out, err = run("verify", path, "--model", model)
    assert (code, "reproduced" in out, told_lies(out + err)) == (commands.HOLDS, True, [])
    assert "only in the first: x\\x0areceipt.json\\x0d\\x0a  all 12 tokens" in out
    code, out, err = run("diff", honest, path)
    assert (code, told_lies(out + err)) == (commands.REFUTED, [])
    named = tmp_path / "named.json"
    named.write_text(json.dumps({**receipt.to_json(), LIE: 1, "id": "\ud800"}))
    generate_key(tmp_path / "mine")
    for command in (
        ["verify", named, "--model", model],
        ["diff", named, honest],
        ["receipts", "sign", named, "--key", tmp_path / "mine"],
    ):
        code, out, err = run(*command)
        assert (code != 0, told_lies(out + err)) == (True, [])
        assert len(err.splitlines()) == 1


# -- diff --------------------------------------------------------------------------------------------------------


def test_diff(run: Run, receipt: Receipt, model: Path, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", receipt), write(tmp_path / "b.json", forged(receipt))
    code, out, _ = run("diff", a, a)
    assert (code, "the same" in out) == (commands.HOLDS, True)
    code, out, _ = run("diff", a, b)
    assert (code, "choice 0, position 5: token" in out) == (commands.REFUTED, True)
    code, out, _ = run("diff", a, b, "--model", model)
    assert f"{(receipt.choices[0].token_ids or ())[5]})" in out
    code, out, _ = run("diff", a, b, "--json")
    found = json.loads(out)
    assert (found["a"], [one["part"] for one in found["differences"]]) == (receipt.id, ["token"])
    code, _, err = run("diff", a, tmp_path / "nothing.json")
    assert (code, "cannot be read" in err) == (commands.NOT_CHECKED, True)


def test_diff_of_two_files_of_receipts(run: Run, receipt: Receipt, tmp_path: Path) -> None:
    second = dataclasses.replace(receipt, id="second")
    (tmp_path / "a.jsonl").write_bytes(receipt.to_bytes() + b"\n" + second.to_bytes() + b"\n")
    (tmp_path / "b.jsonl").write_bytes(forged(second).to_bytes() + b"\n")
    code, out, _ = run("diff", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json")
    one, other = map(json.loads, out.splitlines())
    assert code == commands.REFUTED
    assert one["differences"][0]["sentence"] == "only in the first file"
    assert other["differences"][0]["part"] == "token"
