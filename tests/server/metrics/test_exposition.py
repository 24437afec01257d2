"""`/metrics`: what it says is declared and documented, both formats can be read, nobody else's words become labels."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, Answer, call
from fakes import HELLO, SILENT, FakeEngine, chat, make_app
from hypothesis import given, settings, strategies as st
from ledger_for_tests import Clock
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from engine import ModelStatus, QueueFull
from server.accounts.charging import Meter
from server.errors import TABLE
from server.ledger.records import LedgerFault
from server.ledger.store import Ledger
from server.metrics.counts import METHODS, OTHER, OUTCOMES, REASONS
from server.metrics.series import PREFIX, SERIES
from server.metrics.snapshot import STATES

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "operation.md"
OPENMETRICS = b"application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


APP = make_app(FakeEngine())


def scrape(app: Any, *headers: tuple[bytes, bytes]) -> Answer:
    return call(app, path="/metrics", headers=headers)


def samples(app: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of ours, by name and labels."""
    families = text_string_to_metric_families(scrape(app).body.decode())
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        if family.name.startswith(PREFIX)
        for sample in family.samples
    }


def value(app: Any, name: str, **labels: str) -> float:
    return samples(app)[name, tuple(sorted(labels.items()))]


def test_the_guide_has_the_metrics_that_there_are() -> None:
    rows = [
        f"| `{PREFIX}{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.meaning} | "
        f"{one.peer} |"
        for one in SERIES
    ]
    table = GUIDE.read_text(encoding="utf-8").split("<!-- metrics:")[1].split("<!-- end of metrics")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


def test_the_guide_speaks_of_no_metric_that_there_is_not() -> None:
    named = set(re.findall(rf"{PREFIX}(\w+)", GUIDE.read_text(encoding="utf-8")))
    own = {one.name for one in SERIES}
    assert {name.removesuffix("_bucket") for name in named} == own


def test_both_formats_say_the_same() -> None:
    app = make_app(FakeEngine(), ModelStatus("slow", "loading", "1 of 2 GiB"))
    assert call(app, chat()).status == 200
    plain, other = scrape(app), scrape(app, (b"accept", OPENMETRICS))
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert other.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    read = {family.name: family for family in text_string_to_metric_families(plain.body.decode())}
    again = {family.name: family for family in openmetrics_families(other.body.decode())}
    ours = {name for name in read if name.startswith(PREFIX)}
    assert ours == {PREFIX + one.name.removesuffix("_total") for one in SERIES}
    for name in ours - {PREFIX + "http_requests"}:  # the first scrape is in the second one
        assert [(one.labels, one.value) for one in read[name].samples] == [
            (one.labels, one.value) for one in again[name].samples
        ]
    kinds = {PREFIX + one.name.removesuffix("_total"): one.kind for one in SERIES}
    assert {name: family.type for name, family in read.items() if name in ours} == kinds


@given(
    accept=st.lists(
        st.sampled_from(
            ["application/openmetrics-text", "version=1.0.0", "version=9", "q=0", ";", ",", '"', "é", "*/*"]
        ),
        max_size=9,
    )
)
@settings(max_examples=20, deadline=None)
def test_any_accept_header_is_answered(accept: list[str]) -> None:
    answer = scrape(APP, (b"accept", "".join(accept).encode("latin-1")))
    assert answer.status == 200
    kind = answer.headers["content-type"]
    reader = openmetrics_families if "openmetrics" in kind else text_string_to_metric_families
    assert len(list(reader(answer.body.decode()))) > len(SERIES) / 2


def test_a_model_has_one_state() -> None:
    states = [ModelStatus(state, state, "") for state in ("loading", "failed")]  # type: ignore[arg-type]
    app = make_app(FakeEngine(), *states)
    found = samples(app)
    for model, state in (("fake", "ready"), ("loading", "loading"), ("failed", "failed")):
        hot = [one for one in STATES if found["model_state", (("model_name", model), ("state", one))]]
        assert hot == [state]
    assert value(app, "model_info", model_name="fake", system_fingerprint="fp_fake", device="cpu", dtype="float32",
                 runner="packed", reproducible="yes") == 1.0  # fmt: skip


# -- what cannot become a label -------------------------------------------------------------------------------------


def allowed() -> dict[str, set[str]]:
    codes = {cls.code for cls, _, _ in TABLE}

    def below(cls: Any) -> Iterator[Any]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    codes |= {child.code for cls, _, _ in TABLE for child in below(cls)}
    codes |= {
        "internal_error",
        "unknown_field",
        "http_error",
    }
    return {
        "model_name": {"fake"}, "method": {*METHODS, OTHER}, "outcome": set(OUTCOMES), "finished_reason": set(REASONS),
        "state": set(STATES), "code": codes, "status": {"none", *map(str, range(200, 600))},
        "endpoint": {
            OTHER, CHAT, "/v1/models/{model_id}", "/v1/models", "/metrics", "/health", "/v1/receipts/{receipt_id}",
            "/v1/receipts",
        },
        "system_fingerprint": {"fp_fake"}, "device": {"cpu"}, "dtype": {"float32"}, "runner": {"packed"},
        "reproducible": {"yes", "no"},
    }  # fmt: skip


NASTY = st.text(st.sampled_from(string.ascii_letters + '/{}"\\\n:%é'), min_size=1, max_size=12)


@given(names=st.lists(NASTY, min_size=1, max_size=4), method=st.sampled_from(["GET", "POST", "PURGE", 'X"}', "DELETE"]))
@settings(max_examples=10, deadline=None)
def test_what_a_client_makes_up_becomes_no_label(names: list[str], method: str) -> None:
    app = APP
    for name in names:
        call(app, chat(model=name, user=name, metadata={name: name}, **{"x" + name: 1}))
        call(app, chat(temperature=99, stop=name))
        call(app, path="/" + name, method=method)
        call(app, path="/v1/models/" + name)
        call(app, path="/v1/receipts/" + name)
        call(app, path="/health", hosts=[name.encode()])
        call(app, path="/v1/models", headers=[(b"origin", name.encode()), (b"x-request-id", name.encode())])
    known, version = allowed(), {"version"}
    for name, labels in samples(app):
        for label, told in labels:
            if label not in version and label != "le":
                assert told in known[label], (name, label, told)
    assert len(samples(app)) < 700, "bounded, whatever is sent"


# -- who may read ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Meter]:
    meter = Meter(Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", Clock()), {}, Clock())
    yield meter
    meter.close()


def bearer(secret: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {secret}".encode()


@pytest.mark.parametrize(
    ("setting", "nobody", "user", "admin"),
    [("admin", 401, 403, 200), ("open", 200, 200, 200), ("off", 401, 404, 404), (False, 401, 404, 404)],
)
def test_with_keys(keys: Meter, setting: Any, nobody: int, user: int, admin: int) -> None:
    root, ada = keys._ledger.create_key("root", admin=True), keys._ledger.create_key("ada")
    app = make_app(meter=keys, metrics=setting)
    assert scrape(app).status == nobody
    assert scrape(app, bearer(ada.secret)).status == user
    answer = scrape(app, bearer(root.secret))
    assert answer.status == admin
    for told in (root.secret, ada.secret, root.key.shown, '"ada"', '"root"', root.key.id):
        assert told.encode() not in answer.body
    if admin == 200:
        document = call(app, path="/openapi.json", headers=[bearer(ada.secret)]).json
        assert ("security" in document["paths"]["/metrics"]["get"]) is (setting == "open")


@pytest.mark.parametrize(("setting", "elsewhere"), [("admin", 403), ("open", 200), ("off", 404)])
def test_without_keys(setting: str, elsewhere: int) -> None:
    app = make_app(metrics=setting, allow_anonymous=True, host="0.0.0.0")
    assert scrape(app).status == (404 if setting == "off" else 200)
    assert scrape(app, (b"x-forwarded-for", b"10.0.0.1")).status == elsewhere
    assert call(app, path="/metrics", hosts=[b"server.lan"]).status == elsewhere
    page = call(app, path="/metrics", headers=[(b"origin", b"https://evil.test")])
    assert (page.status, page.error["code"]) == (403, "origin_not_allowed")


# -- what is counted beside replies ---------------------------------------------------------------------------------


def test_refusals_and_requests() -> None:
    app = make_app(FakeEngine(submit_error=QueueFull("full", limit=1)))
    assert call(app, chat()).status == 503
    assert call(app, chat(temperature=99)).status == 422
    assert call(app, path="/api/v1/models/").status == 200
    assert call(app, path="/v1/models", method="HEAD").status == 200
    assert value(app, "refusals_total", status="503", code="queue_full") == 1
    assert value(app, "http_requests_total", endpoint="/v1/models", method="GET", status="200") == 1
    assert value(app, "http_requests_total", endpoint="/v1/models", method="HEAD", status="200") == 1
    assert value(app, "http_requests_total", endpoint=CHAT, method="POST", status="422") == 1
    assert value(app, "http_requests_active") == 1, "the scrape itself"
    assert all(not value(app, "replies_total", model_name="fake", outcome=one) for one in OUTCOMES)


def test_a_bug_is_counted_and_the_scrape_goes_on() -> None:
    engine = FakeEngine(HELLO, prepare_error=ZeroDivisionError())
    app = make_app(engine)
    assert call(app, chat()).status == 500
    assert value(app, "refusals_total", status="500", code="internal_error") == 1


def test_the_ledgers_faults(keys: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    root = keys._ledger.create_key("root", admin=True)
    app = make_app(FakeEngine(SILENT), meter=keys, metrics="open")
    assert (value(app, "ledger_up"), value(app, "ledger_faults_total")) == (1, 0)

    def broken(*_: Any) -> Any:
        raise LedgerFault("the disk is gone")

    monkeypatch.setattr(keys._ledger, "authenticate", broken)
    assert scrape(app, bearer(root.secret)).status == 200, "an open path asks no ledger"
    assert call(app, path="/v1/models", headers=[bearer(root.secret)]).status == 503
    assert (value(app, "ledger_up"), value(app, "ledger_faults_total")) == (0, 1)
    assert "ledger_up" not in {name for name, _ in samples(make_app())}, "no keys, no ledger"
