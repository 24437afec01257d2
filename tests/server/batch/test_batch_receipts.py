"""A batch with receipts: the same bytes whatever the load and the time, and every receipt in the output holds."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_lines import answered, completion, line, many, write

from engine import LLM, ModelConfig, Registry, check_receipt, read_document, read_receipt
from server import cli
from server.batch.answering import TEMPLATE_CLOCK
from server.receipts.commands import HOLDS, NOT_CHECKED, REFUTED

DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}"
"""A chat template that prints the time."""


def mixed() -> list[dict[str, Any]]:
    """Chats and completions: of a text, of token ids, of several prompts, scored without drawing."""
    return [
        *many(10),
        completion("text", "Once there was", max_tokens=6),
        completion("ids", [5, 6, 7], n=2, max_tokens=6),
        completion("several", ["Once", "there was"], n=2, max_tokens=4),
        completion("echo", "Once there was", max_tokens=0, echo=True, logprobs=1),
        line("margins", margins=True),
        line("digest", receipt="digest"),
    ]


def receipts_of(data: bytes) -> list[Any]:
    body = json.loads(data)["response"]["body"]
    return body["receipts"] if "receipts" in body else [body["receipt"]]


def test_completions_are_answered(registry: Registry, tmp_path: Path) -> None:
    """The bytes of a completion depend on no other line; each prompt has its choices."""
    lines = [data for data in mixed() if data["url"] == "/v1/completions"]
    alone = answered(write(tmp_path / "in", lines), registry, 1)
    bodies = {json.loads(data)["custom_id"]: json.loads(data)["response"]["body"] for data in alone}
    assert [len(bodies[name]["choices"]) for name in ("text", "ids", "several", "echo")] == [1, 2, 4, 1]
    assert bodies["echo"]["choices"][0]["text"] == "Once there was"
    assert bodies["text"]["id"].startswith("cmpl-")
    assert answered(write(tmp_path / "mixed", [*many(9), *lines]), registry, 8)[9:] == alone


def test_order_concurrency_and_time_do_not_matter(registry: Registry, tmp_path: Path) -> None:
    lines = mixed()
    source = write(tmp_path / "in", lines)
    alone = answered(source, registry, 1, receipts=True)
    assert answered(source, registry, 8, receipts=True) == alone
    random.Random(4).shuffle(lines)
    assert sorted(answered(write(tmp_path / "shuffled", lines), registry, 5, receipts=True)) == sorted(alone)
    for data in alone:
        told = json.loads(data)["response"]["body"]
        for number, document in enumerate(receipts_of(data)):
            assert document["created"] == 0
            assert document["id"] == told["id"] + (f"-{number}" if number else "")
            assert document["request"].get("clock") in (TEMPLATE_CLOCK.isoformat(), None)


def test_every_receipt_holds(registry: Registry, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    llm = LLM(tiny("qwen3"), cache_size="8MiB", context_length=128)
    checked = 0
    for data in answered(write(tmp_path / "in", mixed()), registry, 8, receipts=True):
        for document in receipts_of(data):
            receipt = read_document(document)
            verdict = check_receipt(llm, receipt).verdict
            assert verdict == ("identical" if receipt.has_text else "not_checkable"), data
            checked += receipt.has_text
    assert checked == 16, "one line has two prompts, one asked for digests alone"


def test_asking_for_receipts_changes_no_reply(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixed())
    plain = answered(source, registry, 4)
    recorded = answered(source, registry, 4, receipts=True)
    for one, other in zip(plain, recorded, strict=True):
        a, b = (json.loads(data)["response"]["body"] for data in (one, other))
        assert (a["choices"], a["seed"], a["usage"]) == (b["choices"], b["seed"], b["usage"])


def test_a_wrong_value_of_receipt_is_refused(registry: Registry, tmp_path: Path) -> None:
    lines = [line("a", receipt=0), line("b", receipt="yes"), line("c", receipt=False)]
    out = [json.loads(d)["response"] for d in answered(write(tmp_path / "in", lines), registry, 1, receipts=True)]
    assert [response["status_code"] for response in out] == [400, 422, 200]
    assert read_receipt(json.dumps(out[2]).encode()).id == out[2]["body"]["id"]


@pytest.fixture
def dated(tiny: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    (tmp_path / "dated.jinja").write_text(DATED)
    loaded = []

    def load(**fields: Any) -> Registry:
        entry = ModelConfig(
            id="tiny", path=tiny("qwen3"), chat_template=tmp_path / "dated.jinja", cache_size="8MiB", **fields
        )
        loaded.append(Registry([entry]))
        loaded[-1].start()
        loaded[-1].wait()
        return loaded[-1]

    yield load
    for registry in loaded:
        registry.close()


@pytest.mark.parametrize("pinned", [None, "2020-02-02T10:00:00"])
def test_a_template_that_prints_the_time(
    dated: Callable[..., Registry], tiny: Callable[[str], Path], tmp_path: Path, pinned: str | None
) -> None:
    """It reads the entry's clock, else one that stands still: with receipts and without."""
    source = write(tmp_path / "in", [line("a", "hi", prompt_logprobs=0)])
    model = dated(template_clock=pinned) if pinned else dated()
    [plain], [recorded] = (answered(source, model, 1, receipts=asked) for asked in (False, True))
    told = [json.loads(data)["response"]["body"]["prompt_logprobs"] for data in (plain, recorded)]
    assert told[0] == told[1]
    [document] = receipts_of(recorded)
    clock = pinned or TEMPLATE_CLOCK.isoformat()
    assert document["request"]["clock"] == clock
    llm = LLM(tiny("qwen3"), cache_size="8MiB")
    text = "".join(map(llm.token_text, document["prompt"]["token_ids"]))
    assert text.endswith(f"{clock.replace('T', ' ')} hi")


# -- verify and diff -------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verbatim", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return main


def test_the_output_of_a_batch_is_verified_and_compared(
    run: Run, registry: Registry, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = [line("a"), line("b", n=2), completion("c", ["Once", "there"], max_tokens=4)]
    good = answered(write(tmp_path / "in", lines), registry, 4, receipts=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(good))
    code, out, err = run("verify", "out.jsonl", "--model", tiny("qwen3"))
    assert (code, err.count("error")) == (HOLDS, 0)
    assert "out.jsonl:2 [1]" in out
    assert "out.jsonl:3, prompt 1" in out
    assert out.rstrip().endswith("4 receipts: 4 identical")
    assert run("diff", "out.jsonl", "out.jsonl")[0] == HOLDS

    failed = answered(write(tmp_path / "bad", [line("x", temperature=3)]), registry, 1, receipts=True)
    (tmp_path / "failed.jsonl").write_bytes(b"".join([good[0], *failed, b'{"response": null}\n']))
    code, out, err = run("verify", "failed.jsonl", "--model", tiny("qwen3"))
    assert code == NOT_CHECKED
    assert err.count("this is a reply without a receipt.") == 2
    assert out.rstrip().endswith("3 receipts: 1 identical, 2 not checkable")

    other = answered(write(tmp_path / "other", [line("a", seed=9), *lines[1:]]), registry, 4, receipts=True)
    (tmp_path / "other.jsonl").write_bytes(b"".join(other))
    code, out, _ = run("diff", "out.jsonl", "other.jsonl", "--json")
    found = [json.loads(text) for text in out.splitlines()]
    assert code == REFUTED
    assert [len(pair["differences"]) for pair in found if pair["a"] and pair["b"]] == [0, 0, 0]
