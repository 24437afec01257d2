"""The committed page of clients: what versions.toml and the results say, and complete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from clients.environments import HERE, Client, clients
from clients.instances import instance
from clients.page import PAGE, page
from clients.run import RESULTS

LISTED = clients()


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(LISTED, results()), "run `make clients`"


@pytest.mark.parametrize("client", LISTED, ids=lambda client: client.id)
def test_every_client_was_run_in_the_release_that_is_pinned(client: Client) -> None:
    assert (HERE / client.script).is_file()
    found = results()["clients"][client.id]
    assert found["tries"] or found["not installed"]
    for name, version in found["versions"].items():
        assert any(version in pin for pin in client.packages), f"{name} {version}: run `make clients`"


def test_a_failure_is_numbered_and_explained() -> None:
    client = dataclasses.replace(LISTED[0], id="x", name="X")
    tried = {"endpoint": "responses", "try": "plain", "error": "Boom: a | b", "refusals": [], "ignored": ["foo"]}
    found = {"date": "2026-01-02", "versions": {"x": "1.2"}, "not installed": "", "tries": [tried]}
    text = page([client], {"clients": {"x": found}})
    assert "| X | 1.2 | `/v1/responses` | no (1) | — | — | — | — |  |" in text
    assert "\n1. Boom: a \\| b\n" in text
    assert "- X, `/v1/responses`: `foo`" in text
    refused = {**tried, "refusals": ["POST /v1/responses: 422 nope (`input.0.type`)"]}
    text = page([client], {"clients": {"x": {**found, "tries": [refused, {**refused, "try": "stream"}]}}})
    assert "| no (1) | no (1) |" in text
    assert "\n1. POST /v1/responses: 422 nope (`input.0.type`)\n" in text


def test_one_that_cannot_be_installed_is_named_with_the_reason() -> None:
    client = dataclasses.replace(LISTED[0], id="x", name="X")
    found = {"date": "2026-01-02", "versions": {}, "not installed": "no wheel", "tries": []}
    assert "| X |  | not installable: no wheel |" in page([client], {"clients": {"x": found}})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 7}}, "required": ["a"]},
        {"$defs": {"A": {"enum": ["x"]}}, "type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 3},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
        {"type": ["number", "null"], "maximum": 2},
    ],
    ids=str,
)
def test_instances_satisfy_their_schemas(schema: dict[str, Any]) -> None:
    jsonschema.validate(instance(schema), schema)


def test_a_schema_without_a_known_instance_is_said() -> None:
    with pytest.raises(jsonschema.ValidationError):
        instance({"type": "string", "pattern": "^[0-9]+$"})


def test_scripts_hold_no_address_of_their_own() -> None:
    """Every client is told where the server is: one that went elsewhere would test something else."""
    scripts: list[Path] = [*HERE.glob("*/*.py"), *HERE.glob("*/*.mjs")]
    assert len(scripts) > 15
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert "api.openai.com" not in text
        assert "api.anthropic.com" not in text
