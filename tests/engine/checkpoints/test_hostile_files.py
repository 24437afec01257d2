"""Files that lie: whatever stands in them, a checkpoint loads rightly or is refused in one bounded line, at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from odd_folders import edit, refused

from engine import LoadError, ModelConfig
from engine.checkpoints import claims, json_files
from engine.checkpoints.safetensors_file import read_header
from engine.loading.loader import load
from engine.text import bounded_json

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


def _table(*entries: str) -> bytes:
    text = b"{" + ",".join(entries).encode() + b"}"
    return len(text).to_bytes(8, "little") + text


def _entry(name: str = "a", dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return f"{json.dumps(name)}: {json.dumps({'dtype': dtype, 'shape': shape, 'data_offsets': offsets})}"


HEADERS = {
    "a length of 4 GiB": ((1 << 32).to_bytes(8, "little") + b"{}", "header is longer than the file"),
    "a length beyond 64 bits": (b"\xff" * 8 + b"{}", "header is longer than the file"),
    "no header": (b"{}", "header is longer than the file"),
    "deep nesting": (_table('"a": ' + "[" * 500 + "]" * 500), "nested deeper than 64 levels"),
    "very deep nesting": (_table('"a": ' + "[" * 100_000 + "]" * 100_000), "nested deeper than 64 levels"),
    "a null": (_table('"a": null'), "the entry of 'a' is not an object"),
    "no shape": (_table('"a": {"dtype": "F32", "data_offsets": [0, 4]}'), "'a' has no shape"),
    "no offsets": (_table('"a": {"dtype": "F32", "shape": [1]}'), "'a' has no data_offsets"),
    "a shape of nulls": (_table(_entry(shape=[None])), "'a' has no shape"),
    "a negative shape": (_table(_entry(shape=[-1])), "'a' has no shape"),
    "a giant shape": (_table(_entry(shape=[1 << 62, 1 << 62])), "'a' has no shape"),
    "many axes": (_table(_entry(shape=[1] * 100_000)), "'a' has no shape of at most 64"),
    "a number of 5,000 digits": (_table('"a": {"shape": [' + "9" * 5000 + "]}"), "number of 5000 digits"),
    "a type that is a number": (_table(_entry(dtype=4)), "'a' has no dtype"),
    "offsets out of order": (_table(_entry(offsets=[4, 0])), "'a' has no data_offsets"),
    "another size": (_table(_entry(shape=[2])) + bytes(4), r"of shape \[2\] and type F32 has 4 bytes, not 8"),
    "beyond the end": (_table(_entry(shape=[1 << 40], offsets=[0, 1 << 42])), "is cut short"),
    "a tensor twice": (_table(_entry(), _entry()) + bytes(4), "the key 'a' stands twice"),
    "tensors that overlap": (_table(_entry(), _entry("b")) + bytes(4), "'b' does not begin where"),
    "a gap between tensors": (_table(_entry(), _entry("b", offsets=(5, 9))) + bytes(9), "'b' does not begin where"),
    "no text": (_table("\x00"), "not a readable safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    data, message = HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(LoadError, match=message) as caught:
        read_header(tmp_path / "model.safetensors", "m")
    assert len(caught.value.message) < 400


def _raw(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def _config(**fields: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "config.json", **fields)


def _token(**fields: object) -> Callable[[Path], object]:
    """Change the first of the added tokens."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text())
        data["added_tokens"][0] |= fields
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return change


def _model(**fields: object) -> Callable[[Path], object]:
    """Change the model of the tokenizer."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"] |= fields
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return change


def _two_with_one_id(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["another"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(data))


CLAIMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "ten million layers": (
        _config(num_hidden_layers=10**7, layer_types=None),
        r"num_hidden_layers = 10000000, and the weights hold \d+ tensors",
    ),
    "as many, inside": (_config(vision_config={"depth": 10**7}), r"vision_config\.depth = 10000000, and the weights"),
    "as many, as a fraction": (_config(num_hidden_layers=1e7, layer_types=None), "num_hidden_layers = 10000000, and"),
    "ten million rows": (_config(vocab_size=10**7), r"a model of \d+ parameters, and the weights hold \d+ numbers"),
    "ten million labels": (_config(num_labels=10**7), "num_labels = 10000000 is beyond 65536"),
    "positions without end": (_config(max_position_embeddings=1 << 40), "is beyond 2147483648"),
    "more than 64 bits": (_config(hidden_size=2**70), "hidden_size = 1180591620717411303424, which no 64-bit number"),
    "a number of 5,000 digits": (_raw("config.json", '{"a": ' + "9" * 5000 + "}"), "number of 5000 digits is not read"),
    "NaN": (_raw("config.json", '{"rms_norm_eps": NaN}'), "NaN is not a number"),
    "a key twice": (_raw("config.json", '{"model_type": "qwen3", "model_type": "llama"}'), "'model_type' stands twice"),
    "deep nesting": (_raw("generation_config.json", '{"a": ' + "[" * 100 + "]" * 100 + "}"), "deeper than 64 levels"),
    "very deep nesting": (_raw("tokenizer_config.json", "[" * 10**6), "deeper than 64 levels"),
    "an index with a key twice": (
        _raw("model.safetensors.index.json", '{"weight_map": {"a": "b", "a": "c"}}'),
        "twice",
    ),
    "half a character": (
        lambda f: ((f / "chat_template.jinja").unlink(), edit(f / "tokenizer_config.json", chat_template="\ud800")),
        "half a character",
    ),
    "a token far away": (
        lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={str(10**12): {"content": "a"}}),
        "names a token 1000000000000; ids beyond 16777216 are not read",
    ),
    "a token far away, elsewhere": (_raw("added_tokens.json", '{"a": 4294967295}'), "names a token 4294967295"),
    "a negative token": (_token(id=-1), "cannot load the tokenizer"),
    "a giant token": (_token(id=2**40), "cannot load the tokenizer"),
    "one id twice": (_two_with_one_id, "gives one id to several of its"),
    "merges of no tokens": (_model(merges=[["nope", "nada"]]), "cannot load the tokenizer.*nope"),
    "a library that panics": (_model(continuing_subword_prefix="nope"), "PanicException|cannot load the tokenizer"),
    "a template of 2 MB": (_raw("chat_template.jinja", "a" * 2_000_000), "has 2000000 characters; more than 1048576"),
    "a template that never ends": (
        _raw("chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        r"takes more than \d+ steps",
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_claim_that_cannot_be_is_refused_before_it_costs(case: str, folder: Path) -> None:
    write, message = CLAIMS[case]
    write(folder)
    refused(folder, message)


def test_what_is_counted_comes_before_what_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of transformers sees a configuration that our counts refuse."""
    from transformers import AutoConfig

    def built(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(AutoConfig, "from_pretrained", built)
    edit(folder / "config.json", num_hidden_layers=10**7)
    refused(folder, "num_hidden_layers = 10000000")


def test_files_beyond_the_bounds_are_not_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_json, "MOST_VALUES", 200)
    refused(folder, r"tokenizer\.json: it holds up to \d+ values; more than 200 are not read")
    monkeypatch.setattr(json_files, "MOST_BYTES", 1000)
    refused(folder, r"tokenizer\.json: it has \d+ bytes; more than 1000 are not read")


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 10**7), ("embedding_length", 10**12), ("attention.head_count", 10**9), ("context_length", 2**40)],
)
def test_a_gguf_file_makes_the_same_claims(key: str, value: int) -> None:
    sizes = {f"blk.{i}.attn_q.weight": 64 * 64 for i in range(2)}
    claims.check_gguf(
        {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64}, sizes, "m"
    )
    with pytest.raises(LoadError, match=f"llama.{key} = {value} is beyond"):
        claims.check_gguf({f"llama.{key}": value}, sizes, "m")


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20),
        st.sampled_from(["float16", "nope", "a" * 100_000, 10**7, -1, 0, 1e400]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in list(parts)[:40]:
        yield from _places(part, (*place, key))


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data(), file=st.sampled_from(FILES), value=JSON)
def test_any_value_anywhere_loads_or_is_refused(
    data: st.DataObject, file: str, value: Any, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """One value of one file becomes another: the model loads, or one line says why not."""
    folder = tmp_path / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny("qwen3"), folder)
    whole = json.loads((folder / file).read_text())
    place = data.draw(st.sampled_from(list(_places(whole))))
    part: Any = whole
    for key in place[:-1]:
        part = part[key]
    if place:
        part[place[-1]] = value
    else:
        whole = value
    (folder / file).write_text(json.dumps(whole))
    try:
        load(ModelConfig(id="m", path=folder, cache_size="4MiB", max_sequences=1))
    except LoadError as error:  # anything else fails the test
        told = error.message
    else:
        told = "m: loaded"
    assert told.startswith("m: ")
    assert told.isprintable()
    assert len(told) < 800
