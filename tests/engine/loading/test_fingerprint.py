"""What is computed and what an entry fills in are told apart: each has its parts, its digest, and changes alone."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import platform
import shutil
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import ModelConfig, ModelInfo, fingerprint_of, part_differences
from engine.checkpoints import checkpoint
from engine.loading import fingerprint, identity, versions as libraries
from engine.loading.loader import load
from engine.types import versions
from engine.types.sampling_params import SAMPLING_FIELDS

RESPONSE = {"start_anchor": "<|im_start|>assistant", "fields": {"content": {}}}


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


def _info(folder: Path, **fields: Any) -> ModelInfo:
    return load(ModelConfig(**{"id": "m", "path": folder, "cache_size": "8MiB", "threads": 1, **fields})).info


def _told(one: ModelInfo, other: ModelInfo) -> set[str]:
    """The names of parts that differ."""
    return {sentence.split()[0] for sentence in part_differences(one.fingerprint_parts, other.fingerprint_parts)}


def test_digests_are_of_the_parts_and_parts_are_plain(folder: Path) -> None:
    info = _info(folder, sampling={"stop": ["a", "b"], "logit_bias": {"3": 1.5}, "seed": 2**62})
    assert info.system_fingerprint == fingerprint_of(info.fingerprint_parts, "vb-")
    assert info.defaults_fingerprint == fingerprint_of(info.default_parts, "vd-")
    assert len(info.system_fingerprint) == len(info.defaults_fingerprint) == 19
    for parts in (info.fingerprint_parts, info.default_parts):
        assert all(value is None or isinstance(value, str | int | float | bool) for value in parts.values())
        assert json.loads(json.dumps(parts)) == parts
        assert fingerprint_of(json.loads(json.dumps(parts)), "") == fingerprint_of(parts, "")
    assert pickle.loads(pickle.dumps(info)) == info


def test_tests_may_install_triton_beside_the_cpu_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` does. A reply computed on a CPU is the same with it, so its fingerprint is, too."""
    before = _info(folder)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.9" if name == "triton" else version(name))
    assert _told(before, _info(folder)) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": {"temperature": 0.25}},
        {"sampling": {"stop": ["x"]}},
        {"template_clock": dt.datetime(2026, 1, 31)},
        {"max_completion_tokens": 7},
        {"context_length": 100},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_default_changes_the_defaults_alone(folder: Path, fields: dict[str, Any]) -> None:
    """A request that names every field gets the same bytes from both entries; one that does not is warned."""
    before, after = _info(folder), _info(folder, **fields)
    assert after.system_fingerprint == before.system_fingerprint
    assert after.defaults_fingerprint != before.defaults_fingerprint
    [told] = part_differences(before.default_parts, after.default_parts)
    changed = next(iter(fields.get("sampling", fields)))
    assert told.startswith(f"{changed} ")


def test_a_default_that_says_what_is_so_anyway_changes_nothing(folder: Path) -> None:
    assert _info(folder, sampling={"temperature": 1}).defaults_fingerprint == _info(folder).defaults_fingerprint


def test_a_checkpoints_own_defaults_are_defaults(folder: Path) -> None:
    before = _info(folder)
    given = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**given, "do_sample": True, "temperature": 0.5}))
    after = _info(folder)
    assert after.system_fingerprint == before.system_fingerprint
    assert part_differences(before.default_parts, after.default_parts) == ["temperature 1.0 → 0.5"]


def test_every_field_that_a_request_may_leave_out_has_a_default_part(folder: Path) -> None:
    assert SAMPLING_FIELDS.keys() <= _info(folder).default_parts.keys()


def test_every_version_and_every_library_is_a_part(folder: Path) -> None:
    parts = _info(folder).fingerprint_parts
    for name in libraries.tried().keys() - {"accelerate", "gguf", "huggingface-hub"}:
        assert str(parts[name]).partition("+")[0] == metadata.version(name).partition("+")[0]
    assert parts["verbatim"] == versions.PROJECT_VERSION
    assert parts["sampler"] == versions.SAMPLER_VERSION
    assert parts["prompt_format"] == versions.PROMPT_FORMAT_VERSION
    assert parts["reply_format"] == versions.REPLY_FORMAT_VERSION
    assert parts["cpu_kernels"] == versions.CPU_KERNELS_VERSION
    assert "gpu_kernels" not in parts
    assert str(parts["python"]).startswith("CPython 3.")
    assert parts["libc"]
    assert parts["platform"] == f"{platform.system()} {platform.machine()}"


@pytest.mark.parametrize(
    "name",
    ["PROJECT_VERSION", "SAMPLER_VERSION", "PROMPT_FORMAT_VERSION", "REPLY_FORMAT_VERSION", "CPU_KERNELS_VERSION"],
)
def test_a_raised_version_changes_the_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = _info(folder)
    monkeypatch.setattr(versions, name, 99)
    after = _info(folder)
    assert _told(before, after) == {"verbatim" if name == "PROJECT_VERSION" else name.removesuffix("_VERSION").lower()}
    assert after.system_fingerprint != before.system_fingerprint


def test_each_kind_of_device_has_kernels_of_its_own_version() -> None:
    """A change to one does not disturb those who compute on the other."""
    cpu, gpu = (fingerprint.code_parts(on_cpu=on_cpu) for on_cpu in (True, False))
    assert set(part_differences(cpu, gpu)) == {
        f"only in the first: cpu_kernels {versions.CPU_KERNELS_VERSION}",
        f"only in the second: gpu_kernels {versions.GPU_KERNELS_VERSION}",
    }


@pytest.mark.parametrize(("on_cpu", "there"), [(True, False), (False, True)])
def test_the_compiler_of_a_gpus_kernels_counts_where_there_is_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, there: bool
) -> None:
    """It is installed on many machines where nothing computes with it."""
    honest = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "triton" else honest(name))
    found = checkpoint.inspect(folder, "m")
    placement = SimpleNamespace(on_cpu=on_cpu, device_map={"": "somewhere"})
    more = identity._other_libraries(found, SimpleNamespace(placement=placement))  # type: ignore[arg-type]
    assert fingerprint.library_parts(more).get("triton") == ("9.9" if there else None)
    assert on_cpu is False or "triton" not in _info(folder).fingerprint_parts


def test_the_version_is_the_packages() -> None:
    root = Path(__file__).resolve().parents[3]
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == versions.PROJECT_VERSION


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def _tool_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}{{ tools }}")


def _shipped(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "response_template": RESPONSE}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_template, {"template"}),
        (_tool_template, {"tool_template", "chat_format"}),
        (_shipped, {"response_template", "chat_format"}),
    ],
)
def test_what_prompts_and_replies_are_made_by_is_a_part(
    folder: Path, change: Callable[[Path], None], told: set[str]
) -> None:
    before = _info(folder)
    change(folder)
    after = _info(folder)
    assert after.system_fingerprint != before.system_fingerprint
    assert _told(before, after) <= told
    assert min(told) in _told(before, after) or max(told) in _told(before, after)


def test_an_entrys_own_templates_are_parts(folder: Path, tmp_path: Path) -> None:
    before = _info(folder)
    (tmp_path / "r.json").write_text(json.dumps(RESPONSE))
    read = _info(folder, response_template=tmp_path / "r.json")
    assert "response_template" in _told(before, read)
    (tmp_path / "t.jinja").write_text((folder / "chat_template.jinja").read_text())
    assert _info(folder, chat_template=tmp_path / "t.jinja").system_fingerprint == before.system_fingerprint
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<think>{{ m.content }}</think>{% endfor %}")
    assert _told(before, _info(folder, chat_template=tmp_path / "t.jinja")) >= {"template", "chat_format"}


def test_code_that_comes_with_a_checkpoint_counts_where_it_may_run(folder: Path) -> None:
    before = _info(folder)
    (folder / "modeling.py").write_text("x = 1\n")
    assert _info(folder).system_fingerprint == before.system_fingerprint
    one = _info(folder, trust_remote_code=True)
    (folder / "modeling.py").write_text("x = 2\n")
    other = _info(folder, trust_remote_code=True)
    assert _told(before, one) == _told(one, other) == {"remote_code"}
    assert "modeling.py" in dict(one.manifest.files)
    assert "modeling.py" not in dict(before.manifest.files)
