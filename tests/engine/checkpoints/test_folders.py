"""Folders as people have them: what is loaded is counted and hashed, templates lie anywhere, damage has a name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from odd_folders import edit as _edit, refused as _refused
from safetensors.torch import load_file, save_file

from engine import LLM, LoadError, ModelConfig, NotEnoughMemory
from engine.checkpoints import checkpoint
from engine.errors import InvalidParameter
from engine.loading import loader
from engine.loading.loader import load
from engine.replies.chat_format import find_chat_format
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage, ToolCall
from engine.types.requests import GenerationRequest
from engine.types.tools import Tool


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


# -- weights ---------------------------------------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    _edit(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("sharded", [True, False])
def test_what_is_loaded_is_what_is_counted_and_hashed(sharded: bool, folder: Path) -> None:
    """Mistral's own `consolidated.safetensors` beside the shards would need twice the memory, and change the name."""
    if sharded:
        _shard(folder)
    before, name = checkpoint.inspect(folder, "m"), load(ModelConfig(id="m", path=folder)).info.system_fingerprint
    tensors = load_file(before.files[0])
    save_file(tensors, folder / "consolidated.safetensors")
    after = checkpoint.inspect(folder, "m")
    assert (after.parameters, after.stored_bytes, after.files) == (before.parameters, before.stored_bytes, before.files)
    assert load(ModelConfig(id="m", path=folder)).info.system_fingerprint == name
    tensors["model.norm.weight"] = tensors.get("model.norm.weight", next(iter(tensors.values()))) + 0.5
    save_file(tensors, before.files[0], {"format": "pt"})
    assert load(ModelConfig(id="m", path=folder)).info.system_fingerprint != name


def _lora(folder: Path, base: str | None = "Qwen/Qwen3-0.6B") -> None:
    _edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=base)
    save_file({}, folder / "adapter_model.safetensors")


def _only_lora(folder: Path) -> None:
    for file in folder.glob("*.*"):
        file.unlink()
    _lora(folder)


def _only_consolidated(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _only_gguf(folder: Path) -> None:
    for file in folder.glob("*.*"):
        file.unlink()
    (folder / "tiny-Q4_0.gguf").write_bytes(b"GGUF")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (_only_lora, r"an adapter \(LoRA\) for Qwen/Qwen3-0\.6B, not a model: serve that one"),
    "an adapter beside a model": (_lora, r"adapter_config\.json\) beside a whole model: move the adapter's files"),
    "another format": (_only_consolidated, r"holds consolidated\.safetensors, but neither model\.safetensors nor"),
    "GGUF files": (_only_gguf, r"holds GGUF files: give one of them, such as .*tiny-Q4_0\.gguf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_named_as_such(kind: str, folder: Path) -> None:
    make, message = KINDS[kind]
    make(folder)
    _refused(folder, message)


def test_a_file_that_is_no_gguf_file_is_named(folder: Path) -> None:
    _refused(
        folder / "model.safetensors", r"model\.safetensors is a file; give the folder of a checkpoint, or a \.gguf"
    )


# -- templates -------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOLS = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{{ flag }}" + PLAIN
TOOL = Tool("look", parameters={})


def _in_additional(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)


def _in_list(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]
    _edit(folder / "tokenizer_config.json", chat_template=named)


def _in_additional_beside_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    _edit(folder / "tokenizer_config.json", chat_template=PLAIN)
    _in_additional(folder)


def _in_additional_beside_processor(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    _edit(folder / "chat_template.json", chat_template=PLAIN)
    _in_additional(folder)


def _named_in_processor(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    _edit(folder / "chat_template.json", chat_template={"default": PLAIN, "tool_use": TOOLS})


@pytest.mark.parametrize(
    "place",
    [_in_additional, _in_list, _in_additional_beside_config, _in_additional_beside_processor, _named_in_processor],
)
def test_a_request_with_tools_is_rendered_by_the_template_for_tools(
    place: Callable[[Path], None], folder: Path
) -> None:
    (folder / "chat_template.jinja").write_text(PLAIN)
    without = load(ModelConfig(id="m", path=folder)).info.system_fingerprint
    place(folder)
    llm = LLM(folder)
    template, hello = llm.engine.model.template, [ChatMessage("user", "Hi")]
    assert template.render(hello) == "<user>Hi"
    assert template.render(hello, tools=[TOOL]) == "[look]<user>Hi"
    assert template.render(hello, {"flag": "!"}, tools=[TOOL]) == "[look]!<user>Hi"
    with pytest.raises(InvalidParameter, match=r"no variable 'flag'"):  # it would be ignored
        template.render(hello, {"flag": "!"})
    assert llm.info.system_fingerprint != without
    asked = llm.generate(hello, tools=[TOOL], max_tokens=1, seed=1)[0].usage.prompt_tokens
    assert asked > llm.generate(hello, max_tokens=1, seed=1)[0].usage.prompt_tokens
    first = llm.info.system_fingerprint
    for file in (*folder.glob("*.json"), *folder.glob("additional_chat_templates/*")):
        if "[{{ t.function.name }}]" in (text := file.read_text()):
            file.write_text(text.replace("[{{ t.function.name }}]", "({{ t.function.name }})"))
    assert load(ModelConfig(id="m", path=folder)).info.system_fingerprint != first


def test_the_form_of_calls_is_read_off_the_template_for_tools() -> None:
    calls = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>'
        "{% endfor %}{% endfor %}"
    )
    chat_format = find_chat_format(ChatTemplate(PLAIN, tool_use=calls))
    assert chat_format.shows_tools
    assert chat_format.tool_format is not None
    assert chat_format.tool_format.open.startswith("<call>")


def test_a_conversation_with_calls_but_without_tools_keeps_what_was_said(folder: Path) -> None:
    """The default template knows no calls: their text must be written for it, not left out."""
    (folder / "chat_template.jinja").write_text(PLAIN)
    _in_additional(folder)
    llm = LLM(folder)
    said = (
        ChatMessage("user", "Look!"),
        ChatMessage("assistant", None, tool_calls=(ToolCall("1", "look", '{"far": true}'),)),
        ChatMessage("tool", "a hill", tool_call_id="1"),
    )
    prepared = llm.engine.prepare(GenerationRequest(request_id="r", messages=said, sampling={}))
    text = llm.engine.model.tokenizer.decode(prepared.prompt_token_ids)
    assert '"far": true' in text
    assert "a hill" in text


def test_a_processors_template_is_taken_and_gets_its_parts(folder: Path) -> None:
    """LLaVA's template goes through the parts of a message; given a string it would leave all words out."""
    source = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ p.text }}{% endfor %}{% endfor %}"
    )
    (folder / "chat_template.jinja").unlink()
    _edit(folder / "chat_template.json", chat_template=source)
    template = load(ModelConfig(id="m", path=folder)).template
    turns = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Ho")]
    assert template.render(turns) == "system: Be brief.user: Hiassistant: Ho"


# -- damage ----------------------------------------------------------------------------------------------------------


def _wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _too_many_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"].update({f"word{i}": 1000 + i for i in range(9)})
    path.write_text(json.dumps(data))


def _add_tensor(tensor: str, *shape: int) -> Callable[[Path], object]:
    def add(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, tensor: torch.ones(shape)}, folder / "model.safetensors", {"format": "pt"})

    return add


def _link(name: str, target: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)

    return link


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def _index(file: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        _edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": file})

    return write


def _long_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)


def _header(table: object) -> Callable[[Path], object]:
    text = json.dumps(table).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text for a number": (lambda f: _edit(f / "config.json", hidden_size="wide"), r"hidden_size|wide"),
    "a list for a number": (lambda f: _edit(f / "config.json", num_hidden_layers=[2]), r"num_hidden_layers|list"),
    "no heads": (lambda f: _edit(f / "config.json", num_attention_heads=0), r"cannot"),
    "no layers": (lambda f: _edit(f / "config.json", num_hidden_layers=-1), r"m: "),
    "another size": (lambda f: _edit(f / "config.json", hidden_size=96), r"has the shape .* wants \["),
    "another type": (
        lambda f: _edit(f / "config.json", model_type="mamba"),
        r"MambaConfig|tensors of Mamba",
    ),
    "a type that is a number": (lambda f: _edit(f / "config.json", model_type=7), r"m: "),
    "no type": (lambda f: _edit(f / "config.json", model_type=None), r"m: "),
    "an odd activation": (lambda f: _edit(f / "config.json", hidden_act="nope"), r"nope"),
    "odd scaling": (lambda f: _edit(f / "config.json", rope_parameters={"rope_type": "nope"}), r"nope|rope"),
    "a list for a configuration": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json is not a JSON object",
    ),
    "a wrong shape": (_wrong_shape, r"up_proj\.weight has the shape \[95, 64\] in the checkpoint, .* wants \[96, 64\]"),
    "a header of text": (_header("nothing"), r"not a readable safetensors file"),
    "a header without shapes": (_header({"a": {"data_offsets": [0, 0]}}), r"not a readable safetensors file"),
    "shapes of text": (
        _header({"a": {"dtype": "F32", "shape": "xy", "data_offsets": [0, 0]}}),
        r"not a readable safetensors file",
    ),
    "a tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), r"tokenizer"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("\x00"), r"tokenizer"),
    "a tokenizer of another model": (
        _too_many_tokens,
        r"the tokenizer's ids go up to 1008, but the model embeds only 448",
    ),
    "odd end tokens": (lambda f: _edit(f / "generation_config.json", eos_token_id="x"), r"eos_token_id|generation"),
    "end tokens of text": (lambda f: _edit(f / "config.json", eos_token_id=["</s>"]), r"eos_token_id"),
    "a template that does not parse": (
        lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
        r"not valid Jinja",
    ),
    "a template that is a number": (
        lambda f: ((f / "chat_template.jinja").unlink(), _edit(f / "tokenizer_config.json", chat_template=5)),
        r"chat_template",
    ),
    "a processor's template that is a number": (
        lambda f: ((f / "chat_template.jinja").unlink(), _edit(f / "chat_template.json", chat_template=5)),
        r"chat_template\.json holds no chat template",
    ),
    "a quantisation that nobody knows": (
        lambda f: _edit(f / "config.json", quantization_config={"quant_method": "nope", "bits": "many"}),
        r"quantised \(nope\)",
    ),
    "a bias that the model has not": (
        _add_tensor("model.layers.1.self_attn.q_proj.bias", 64),
        r"holds model\.layers\.1\.self_attn\.q_proj\.bias, for which Qwen3ForCausalLM with this configuration has no",
    ),
    "other weights in the configuration": (
        lambda f: _edit(f / "config.json", transformers_weights="other.safetensors"),
        r"config\.json names other weights in transformers_weights",
    ),
    "a part of a distributed checkpoint": (
        lambda f: shutil.copy(f / "model.safetensors", f / "shard-00001-model-00001-of-00001.safetensors"),
        r"a part of a distributed checkpoint",
    ),
    "a header without end": (_long_header, r"header has 100000001 bytes, more than 100000000 are not read"),
    "weights in the folder above": (_index("../elsewhere.safetensors"), r"names '\.\./elsewhere\.safetensors'"),
    "weights anywhere": (_index("/dev/zero"), r"names '/dev/zero', which is no name of a file beside it"),
    "a template elsewhere": (_link("chat_template.jinja", "/etc/passwd"), r"is a link to /etc/passwd, outside"),
    "a named template elsewhere": (
        _link("additional_chat_templates/tool_use.jinja", "/etc/passwd"),
        r"tool_use\.jinja is a link to /etc/passwd, outside",
    ),
    "a pipe for weights": (_pipe("model.safetensors"), r"model\.safetensors is no regular file"),
    "a pipe for a tokenizer": (_pipe("tokenizer.json"), r"tokenizer\.json is no regular file"),
    "an index that names nothing": (
        lambda f: _edit(f / "model.safetensors.index.json", weight_map=["model.safetensors"]),
        r"names no weight files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_told_in_one_sentence(damage: str, folder: Path) -> None:
    """Never a raw error of a library: those name no model, and say nothing to do."""
    break_it, message = DAMAGES[damage]
    break_it(folder)
    told = _refused(folder, message).message
    assert told.startswith("m: ")


NOISE = "\x1b[31m\u202e" + "nope\n" * 4000


@pytest.mark.parametrize(
    "write",
    [
        lambda f: _edit(f / "config.json", model_type=NOISE),
        lambda f: _edit(f / "config.json", quantization_config={"quant_method": NOISE}),
        lambda f: ((f / "config.json").unlink(), _lora(f, NOISE)),
    ],
)
def test_a_strangers_text_is_told_short_and_plain(write: Callable[[Path], object], folder: Path) -> None:
    """An error goes to a terminal and into a log: it may colour neither, nor fill them."""
    write(folder)
    assert _refused(folder, "nope").message.isprintable()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("boom\nand more"), LoadError),
        (TypeError("boom"), LoadError),
        (ValueError(""), LoadError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), NotEnoughMemory),
        (MemoryError(), NotEnoughMemory),
        (InvalidParameter("boom"), LoadError),
    ],
    ids=repr,
)
def test_what_goes_wrong_anywhere_is_a_load_error(
    error: Exception, kind: type[LoadError], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loader, "_assemble", fail)
    found = _refused(folder, "^m: ")
    assert type(found) is kind
    assert found.__cause__ is error


def test_an_interruption_is_no_load_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "_assemble", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(ModelConfig(id="m", path=folder))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(-2, 2),
    st.sampled_from(["", "nope", "float16", "sliding_attention", [], [0, 1], ["full_attention"] * 2, {}, {"a": 1}]),
)
KEYS = (
    *("architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim"),
    *("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings"),
    *("max_window_layers", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("pad_token_id", "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings", "use_cache"),
    *("use_sliding_window", "vocab_size", "quantization_config", "is_encoder_decoder", "auto_map"),
)


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_configuration_loads_or_is_refused(
    changes: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny("qwen3"), folder)
    _edit(folder / "config.json", **changes)
    with contextlib.suppress(LoadError):  # anything else fails the test
        load(ModelConfig(id="m", path=folder, cache_size="4MiB", max_sequences=1))
