"""The manifest names the files that a load reads, as OpenSSF model signing would, and hashes each once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from engine import LoadError, ModelConfig, ModelManifest
from engine.loading import manifest
from engine.loading.loader import load


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


def _manifest(**fields: Any) -> ModelManifest:
    return load(ModelConfig(**{"id": "m", "cache_size": "8MiB", "threads": 1, **fields})).info.manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_root_digest_is_that_of_model_signing() -> None:
    """Computed by model_signing 1.1.1, whose `Payload` sorts by the parts of a path: "a/b" comes before "a-b"."""
    texts = {"a/b": "1", "a-b": "2", "config.json": "{}", "Z": "3", "a/B": "4", "a.b": "5", "ä": "6", "a/b.c/d": "7"}
    found = ModelManifest.of("toy", {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()})
    assert [name for name, _ in found.files] == ["Z", "a/B", "a/b", "a/b.c/d", "a-b", "a.b", "config.json", "ä"]
    assert found.digest == "c134d53c5e8318fc4d2202ee8d7902be890504c5bf6bc4290c42bf75e957b74f"
    assert found.subject == {"name": "toy", "digest": {"sha256": found.digest}}


def test_the_layout_is_that_of_model_signing() -> None:
    found = ModelManifest.of("m", {"b": "00" * 32, "a": "11" * 32})
    assert found.predicate == {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": True, "ignore_paths": []},
        "resources": [
            {"name": "a", "algorithm": "sha256", "digest": "11" * 32},
            {"name": "b", "algorithm": "sha256", "digest": "00" * 32},
        ],
    }
    assert json.loads(json.dumps(found.predicate)) == found.predicate


BESIDE = ("README.md", "vocab.json", "merges.txt", "tokenizer.model", "preprocessor_config.json", "other.safetensors")


def test_files_that_are_read_are_named_and_no_others(folder: Path) -> None:
    before = _manifest(path=folder)
    for name in BESIDE:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    found = _manifest(path=folder)
    assert dict(found.files) == {name: _sha256(folder / name) for name, _ in found.files}
    assert dict(found.files).keys() - dict(before.files).keys() == {"additional_chat_templates/rag.jinja"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= dict(found.files).keys()
    assert found.name == "model"


def test_nothing_is_opened_that_is_not_named(folder: Path) -> None:
    """Watches what Python opens inside the folder; the libraries in Rust open only weights and tokenizer.json."""
    for name in BESIDE:
        (folder / name).write_text("{}")
    opened: set[str] = set()
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:  # a hook cannot be removed, only told to do nothing
        if event == "open" and watching[0] and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if path.is_relative_to(folder):
                opened.add(path.relative_to(folder).as_posix())

    sys.addaudithook(watch)
    try:
        found = _manifest(path=folder)
    finally:
        watching[0] = False
    # Bounds of this one are checked, and nothing of it is used.
    assert opened - {"preprocessor_config.json", "vocab.json"} <= dict(found.files).keys()
    assert "config.json" in opened


def test_every_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    honest = manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path, count: hashed.append(path) or honest(path, count))
    found = _manifest(path=folder)
    assert sorted(path.relative_to(folder).as_posix() for path in hashed) == sorted(name for name, _ in found.files)


def _early(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> tuple[int, bool]:
    """Load with files that are hashed before, and changed in between. Returns how many were hashed, and whether the
    manifest is that of a load which hashes by itself."""
    config = ModelConfig(id="m", path=folder, cache_size=1 << 20)
    hashed: list[Path] = []
    honest = manifest._digest
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_digest", lambda path, count: hashed.append(path) or honest(path, count))
        early = manifest.EarlyHashes(config)
        early._thread.join()
        change()
        found = load(config, early=early).info.manifest
    return len(hashed), found == load(config).info.manifest


def test_files_that_are_hashed_early_are_not_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, right = _early(folder, monkeypatch, lambda: None)
    assert right
    assert count == len(load(ModelConfig(id="m", path=folder, cache_size=1 << 20)).info.manifest.files)


def _as_old(file: Path, content: bytes) -> None:
    """Write a file whose time of writing tells nothing; that of its last change is the system's, in its own ticks."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "generation_config.json").write_text('{"max_length": 20}'),
        lambda folder: _as_old(folder / "config.json", (folder / "config.json").read_bytes() + b" "),
        lambda folder: _as_old(folder / "config.json", (folder / "config.json").read_bytes()[:-1] + b"\n"),
    ],
    ids=["one more", "longer", "as long, and as old"],
)
def test_files_that_change_after_they_were_hashed_are_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().rstrip() + b" ")
    assert _early(folder, monkeypatch, lambda: change(folder))[1]


@pytest.mark.parametrize("path", ["nowhere", "config.json", 300 * "n"])
def test_what_is_wrong_with_files_is_said_by_the_load(folder: Path, path: str) -> None:
    config = ModelConfig(id="m", path=folder / path)
    early = manifest.EarlyHashes(config)
    with pytest.raises(LoadError, match="m: "):
        load(config, early=early)


def test_shards_and_their_index_are_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {*parts, "model.safetensors.index.json"} <= dict(_manifest(path=folder).files).keys()


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    before = _manifest(path=folder)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    after = _manifest(path=snapshot)
    assert (after.files, after.digest) == (before.files, before.digest)


@pytest.mark.parametrize("builtin", ["demo", "noise"])
def test_builtin_models_have_one(builtin: str) -> None:
    found = _manifest(builtin=builtin)
    assert found.name == builtin
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= dict(found.files).keys()


def test_a_gguf_file_is_its_own_manifest(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "folder", "qwen3", head_dim=128, vocab_size=512)
    path = gguf_files.write(folder, tmp_path / "alone.gguf")
    (tmp_path / "config.json").write_text("{}")
    found = _manifest(path=path)
    assert found.files == (("alone.gguf", _sha256(path)),)
