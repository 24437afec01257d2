"""models.yaml is checked key by key; sizes, clocks and defaults mean what they say."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, ConfigError, ModelConfig, entry_of, parse_models, read_yaml

BAD: dict[str, tuple[Any, str]] = {
    "not a list": ({"id": "a"}, r"'models' must be a list"),
    "empty": ([], r"at least one entry"),
    "not a mapping": (["a"], r"models\[0\] must be a mapping"),
    "no id": ([{"path": "x"}], r"id: Field required"),
    "no source": ([{"id": "a"}], r"exactly one of path .* repo .* builtin"),
    "two sources": ([{"id": "a", "path": "x", "repo": "y"}], r"exactly one of"),
    "twice": ([{"id": "a", "path": "x"}, {"id": "a", "path": "y"}], r"the id 'a' is used twice"),
    "bad size": ([{"id": "a", "path": "x", "cache_size": "lots"}], r"'lots' is not a size; write 4GiB"),
    "bad device": ([{"id": "a", "path": "x", "device": "gpu"}], r"'gpu' is not a device"),
    "bad dtype": ([{"id": "a", "path": "x", "dtype": "int3"}], r"dtype: .*float32.*got 'int3'"),
    "bad number": ([{"id": "a", "path": "x", "max_sequences": 0}], r"max_sequences: .*greater than or equal to 1"),
    "bad default": ([{"id": "a", "path": "x", "sampling": {"temperature": 9}}], r"temperature must be between 0 and 2"),
    "adapters twice": (
        [{"id": "a", "path": "x", "adapters": [{"name": "l", "path": "y"}, {"name": "l", "path": "z"}]}],
        r"adapters: the name 'l' is used twice",
    ),
    "merged and beside": (
        [{"id": "a", "path": "x", "adapters": {"l": {"path": "y", "merge": True}, "m": "z"}}],
        r"adapters: 'l' is merged, so it must be the only adapter",
    ),
    "an adapter's key": (
        [{"id": "a", "path": "x", "adapters": [{"name": "l", "path": "y", "merged": True}]}],
        r"unknown key 'adapters\.0\.merged'; did you mean 'merge'",
    ),
    "an adapter's name": ([{"id": "a", "path": "x", "adapters": {"b:c": "y"}}], r"adapters\.0\.name: .*got 'b:c'"),
    "an adapter without a path": ([{"id": "a", "path": "x", "adapters": {"l": None}}], r"adapters\.0\.path: "),
    "adapters of text": ([{"id": "a", "path": "x", "adapters": "l"}], r"adapters: .*got 'l'"),
    "an adapter's id": (
        [{"id": "a", "path": "x", "adapters": {"l": "y"}}, {"id": "a:l", "path": "x"}],
        r"the id 'a:l' is used twice",
    ),
    "unknown default": ([{"id": "a", "path": "x", "sampling": {"heat": 1}}], r"heat is not a sampling parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_is_named(case: str) -> None:
    entries, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        parse_models(entries, base=Path("/"), where="models.yaml")


@pytest.mark.parametrize(
    ("text", "count"), [("1024", 1024), ("4GiB", 4 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (7, 7)]
)
def test_sizes(text: Any, count: int) -> None:
    assert ModelConfig(id="a", path=Path("x"), cache_size=text).cache_size == count


def test_relative_paths_are_taken_from_the_file_and_dates_are_clocks(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  - {id: a, path: weights, chat_template: t.jinja, template_clock: 2026-01-31}\n")
    [model] = parse_models(read_yaml(file)["models"], base=tmp_path, where=str(file))
    assert model.path == tmp_path / "weights"
    assert model.chat_template == tmp_path / "t.jinja"
    assert model.template_clock == dt.datetime(2026, 1, 31)


@pytest.mark.parametrize("form", ["{l: low, m: {path: ../rank}}", "[{name: l, path: low}, {name: m, path: ../rank}]"])
def test_adapters_are_a_list_or_a_mapping(form: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  - {{id: a, path: weights, adapters: {form}}}\n")
    [model] = parse_models(read_yaml(file)["models"], base=tmp_path, where=str(file))
    found = [(adapter.name, adapter.path, adapter.merge) for adapter in model.adapters]
    assert found == [("l", tmp_path / "low", False), ("m", tmp_path.parent / "rank", False)]
    assert model.adapter_ids == ("a:l", "a:m")


@pytest.mark.parametrize("text", ["models: [", "- a", "\x00", ""])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        read_yaml(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_what_a_script_names_is_looked_for_as_on_the_command_line(tmp_path: Path) -> None:
    """A typing error must not become a question to the hub; a link keeps its name (the hub's blobs have none)."""
    with pytest.raises(ConfigError, match=r"LLM: there is no folder missing\.gguf, no such GGUF file"):
        LLM("missing.gguf")
    (tmp_path / "0123abcd").write_bytes(b"GGUF")
    (tmp_path / "tiny.gguf").symlink_to("0123abcd")
    link = tmp_path / "tiny.gguf"
    assert entry_of(str(link), "x") == {"id": "tiny", "path": link}
    [entry] = parse_models([{"id": "m", "path": "tiny.gguf"}], base=tmp_path, where="models.yaml")
    assert entry.path == link
