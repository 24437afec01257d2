"""The log says what happened: nothing from outside forges it, gives a terminal orders, or has a prompt or key in it."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from asgi import call
from fakes import INFO, PROMPT_TOKENS, FakeEngine, chat, make_app
from hypothesis import given, strategies as st

from server import logs
from server.terminal import Terminal

Form = Literal["text", "json"]
FORMS: tuple[Form, ...] = ("text", "json")
_FIELD = re.compile(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]+)')
_HEAD = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO verbatim\.access: request"


@pytest.fixture
def written() -> Iterator[Callable[[Form], io.StringIO]]:
    """`written(form)`: what the log writes from now on, as the server sets it up."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, threading.excepthook, sys.unraisablehook
    show = warnings.showwarning

    def configure(form: Form) -> io.StringIO:
        logs.configure(form, access_log=True)
        out = io.StringIO()
        [handler] = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(out)
        return out

    yield configure
    logging.captureWarnings(False)
    warnings.showwarning = show
    root.handlers[:], level, threading.excepthook, sys.unraisablehook = before
    root.setLevel(level)


def parsed(line: str, form: Form) -> dict[str, Any]:
    """The fields of a line, as a program would take it apart; fails if anything else stands there."""
    if form == "json":
        entry: dict[str, Any] = json.loads(line)
        return {name: value for name, value in entry.items() if name not in ("time", "level", "logger", "message")}
    found = re.match(f"{_HEAD}((?:{_FIELD.pattern})*)$", line)
    assert found, line
    pairs = _FIELD.findall(found[1])
    assert len({name for name, _ in pairs}) == len(pairs), "a name twice"
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


# -- forging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@given(fields=st.dictionaries(st.sampled_from(["path", "key", "model", "request_id", "method"]), st.text()))
def test_what_was_logged_is_what_is_read_back(form: Form, fields: dict[str, str]) -> None:
    formatter = {"text": logs._TextFormatter, "json": logs._JsonFormatter}[form]()
    record = logging.makeLogRecord({"name": "verbatim.access", "levelname": "INFO", "msg": "request", "fields": fields})
    line = formatter.format(record)
    assert line.isascii()
    assert line.isprintable(), "a line end or an order to a terminal"
    assert parsed(line, form) == fields


FORGED = [
    "/x status=200 key=root",
    '/x" status=200 key="root',
    "/x\\",
    "/x\n2026-11-26 00:00:00,000 INFO verbatim.access: request status=200",
    "/x\r\x1b[2J\x1b]0;owned\x07",
    "/x\u2028status=200",
    "/x\u202etxt.exe",
    "/=",
    "/'",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", FORGED)
def test_a_path_cannot_say_how_it_ended(written: Callable[[Form], io.StringIO], form: Form, path: str) -> None:
    out = written(form)
    assert call(make_app(), path=path).status == 404
    [line] = out.getvalue().splitlines()
    found = parsed(line, form)
    assert (found["path"], str(found["status"]), "key" in found) == (path, "404", False)


def test_plain_values_stay_as_they_are_read(written: Callable[[Form], io.StringIO]) -> None:
    out = written("text")
    logs.access(request_id="req-1", path="/v1/chat/completions", status=200, key=None, model="org/Model-0.6B:q4", ms=7)
    line = out.getvalue().rstrip().partition(": ")[2]
    assert line == "request request_id=req-1 path=/v1/chat/completions status=200 model=org/Model-0.6B:q4 ms=7"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_logged_with_what_it_can_be_had_again_with(
    written: Callable[[Form], io.StringIO], form: Form, stream: bool
) -> None:
    out = written(form)
    assert call(make_app(), chat(seed=7, stream=stream, n=2)).status == 200
    [line] = out.getvalue().splitlines()
    found = {name: str(value) for name, value in parsed(line, form).items()}
    told = {name: found[name] for name in ("model", "seed", "fingerprint", "prompt_tokens", "completion_tokens")}
    assert told == {
        "model": "fake",
        "seed": "7",
        "fingerprint": INFO.system_fingerprint,
        "prompt_tokens": str(PROMPT_TOKENS),
        "completion_tokens": str(_tokens_of_hello(2)),
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_refused_request_is_logged_without_a_reply(written: Callable[[Form], io.StringIO], form: Form) -> None:
    out = written(form)
    assert call(make_app(FakeEngine(limit=0)), chat()).status == 503
    [line] = out.getvalue().splitlines()
    assert str(parsed(line, form)["completion_tokens"]) == "0", "it was admitted, and found the queue full"


def _tokens_of_hello(choices: int) -> int:
    body = call(make_app(), chat(n=choices)).json
    return int(body["usage"]["completion_tokens"])


# -- what must not be in it --------------------------------------------------------------------------------------------

SAID = "my secret words"
KEY = "vk-" + "aB3_" * 10


def _raise(error: BaseException) -> None:
    raise error


def _chained() -> BaseException:
    try:
        try:
            _raise(KeyError(SAID))
        except KeyError as inner:
            raise TypeError(f"not {SAID}\n2026-11-26 00:00:00,000 INFO verbatim.access: request status=200") from inner
    except TypeError as error:
        return error


FAULTS: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: ValueError(f"cannot read {SAID!r}"),
    "chained, with lines of its own": _chained,
    "a group": lambda: ExceptionGroup(SAID, [ValueError(SAID), ExceptionGroup(SAID, [KeyError(SAID)])]),
    "an error of the system with words of ours": lambda: OSError(errno.ENOSPC, SAID, SAID),
    "an error of the system without a number": lambda: OSError(SAID),
    "one that cannot be printed": lambda: type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})(SAID),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_trace_says_where_and_never_what_was_said(
    written: Callable[[Form], io.StringIO], form: Form, fault: Callable[[], BaseException]
) -> None:
    """Whatever a library puts into its exceptions. And no line of it looks like a record."""
    out = written(form)
    error = fault()
    answer = call(make_app(FakeEngine(prepare_error=error)), chat(messages=[{"role": "user", "content": SAID}]))
    assert answer.status == 500
    said = out.getvalue()
    assert SAID not in said
    assert type(error).__name__ in said
    assert "fakes.py" in said, "where it was raised"
    assert answer.error["message"].split()[-1].rstrip(".") in said
    for line in said.splitlines():
        if form == "json":
            json.loads(line)
        else:
            assert line.startswith("    ") or re.match(r"\d{4}-\d\d-\d\d [\d:,]+ \w+ verbatim\.", line)
            assert not line.lstrip().startswith("2026-11-26 00:00:00")


def test_the_systems_own_words_are_kept(written: Callable[[Form], io.StringIO]) -> None:
    out = written("text")
    for error in (OSError(errno.ENOSPC, SAID), MemoryError("1 GiB was asked for")):
        logging.getLogger("verbatim.server").error("internal error", exc_info=error)
    assert "OSError: [Errno 28] No space left on device" in out.getvalue()
    assert "MemoryError: 1 GiB was asked for" in out.getvalue()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_nobody_catches_says_no_more(written: Callable[[Form], io.StringIO]) -> None:
    out = written("text")

    async def forgotten() -> None:
        task = asyncio.ensure_future(_fails())
        await asyncio.sleep(0)
        del task

    async def _fails() -> None:
        raise ValueError(SAID)

    asyncio.run(forgotten())
    thread = threading.Thread(target=_raise, args=(ValueError(SAID),))
    thread.start()
    thread.join()
    said = out.getvalue()
    assert "Task exception was never retrieved" in said
    assert "a thread has ended" in said
    assert said.count("ValueError: (its words are left out") == 2
    assert SAID not in said


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_never_in_it(written: Callable[[Form], io.StringIO], form: Form) -> None:
    """Also where a client puts it into a path, or a library into a message."""
    out = written(form)
    call(make_app(), path=f"/v1/models/{KEY}")
    call(make_app(), path=f"/{'x' * 170}{KEY}")
    logging.getLogger("elsewhere").warning("refused Bearer %s", KEY)
    said = out.getvalue()
    assert len(said.splitlines()) == 3
    assert KEY[:14] not in said
    assert said.count("vk-") == 3


# -- the terminal ------------------------------------------------------------------------------------------------------

ORDERS = "a\x1b[2Jb\x9b31m\x07c\x08\rd\u202ee"


def test_a_terminal_is_given_no_orders_by_what_is_shown() -> None:
    """A model's name, a checkpoint's words, an argument: in lines, in markup and in tables."""
    from rich.markup import escape
    from rich.table import Table

    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, width=200, legacy_windows=False)
    terminal.print(ORDERS, markup=False, highlight=False, soft_wrap=True)
    terminal.print(f"[bold red]error:[/] {escape(ORDERS)}\nand more", highlight=False)
    table = Table()
    table.add_column("name")
    table.add_row(ORDERS)
    terminal.print(table)
    with terminal.status(escape(ORDERS)):
        pass
    said = out.getvalue()
    assert said.count("\\x1b[2Jb") == 4
    assert not re.search("\x1b\\[2J|\x9b|\x07|\x08|\u202e", said)
    assert "\x1b[1;31m" in said, "its own colours stay"
    assert "\nand more" in said
    assert r"a\x1b[2Jb\x9b31mcd\u202ee" in said


# -- dumps -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_crash_leaves_no_dump(tmp_path: Path) -> None:
    """A dump would have prompts and keys in it. A handler that ignores the limit gets one without memory."""
    code = (
        "import resource, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"
        "from server.run import no_core_dumps\n"
        "no_core_dumps()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0], pathlib.Path('/proc/self/coredump_filter').read_text())\n"
        "import os, sys; sys.stdout.flush(); os.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)  # fmt: skip
    assert done.stdout.split() == ["0", "00000000"], done.stderr
    assert done.returncode < 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_what_libraries_say_is_in_the_log_and_forges_nothing(
    written: Callable[[Form], io.StringIO], form: Form, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers has a handler of its own, and warnings go past every logger: lines of either may quote a file."""
    library = logging.getLogger(f"a_library_{form}")
    library.propagate = False
    library.addHandler(logging.StreamHandler(sys.stderr))
    out = written(form)
    library.warning("said\n2026-01-01 INFO verbatim.access: request status=200")
    warnings.showwarning("warned\nof nothing", UserWarning, "file.py", 1)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "said" in lines[0]
    assert "warned" in lines[1]
    assert not capsys.readouterr().err


def test_a_library_that_is_imported_later_uses_the_log_too(written: Callable[[Form], io.StringIO]) -> None:
    """The server sets up its log before it imports most of what it uses."""
    out, own = written("text"), io.StringIO()
    library = logging.getLogger("a_late_library")
    try:
        library.addHandler(logging.StreamHandler(own))
        logs.take_over_libraries()
        library.warning("\x1b[31mred")
    finally:
        library.handlers.clear()
    assert own.getvalue() == ""
    assert "\\x1b[31mred" in out.getvalue() or "\\u001b[31mred" in out.getvalue()
