"""What an installed server says of libraries that the suite never ran with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from engine import ModelConfig, part_differences
from engine.loading import fingerprint, versions
from engine.loading.loader import load


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The versions that seem to be installed: the tried ones, until a test changes one."""
    seeming = {name: releases[0] for name, releases in versions.tried().items()}

    def version(name: str) -> str:
        if name not in seeming:
            raise metadata.PackageNotFoundError(name)
        return seeming[name]

    monkeypatch.setattr(versions.metadata, "version", version)
    versions.warn_of_untried.cache_clear()
    yield seeming
    versions.warn_of_untried.cache_clear()


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torch", "{}+cpu", False),  # the build is not the release
        ("torch", "{}+cu130", False),
        ("torch", "2.11.0+cpu", True),  # in pyproject's range, and not what the suite ran with
        ("transformers", "{}.post1", True),
        ("tokenizers", "0.99", True),
        ("gguf", None, False),  # not installed, so not used
    ],
)
def test_what_is_outside_is_found(installed: dict[str, str], name: str, version: str | None, said: bool) -> None:
    if version is None:
        del installed[name]
    else:
        installed[name] = version.format(installed[name])
    assert versions.untried() == ({name: installed[name]} if said else {})


def test_a_start_says_it_in_one_line(installed: dict[str, str], tiny, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    """Two models, two libraries: one line that names both, with what was tried."""
    [jinja2], [regex] = versions.tried()["jinja2"], versions.tried()["regex"]
    installed |= {"jinja2": "3.0.9", "regex": "2020.1.1"}
    caplog.set_level(logging.WARNING)
    for name in ("one", "two"):
        load(ModelConfig(id=name, path=tiny("qwen3")))
    [line] = [r.getMessage() for r in caplog.records if "tried" in r.getMessage()]
    assert f"jinja2 3.0.9 (tried: {jinja2}), regex 2020.1.1 (tried: {regex})" in line
    assert "torch" not in line


def test_a_start_with_the_lock_says_nothing(installed: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    versions.warn_of_untried()
    assert not caplog.records


WITHOUT_A_PART = {"accelerate", "gguf", "huggingface-hub"}
"""They move bytes, or serve checkpoints of one kind only: docs/decisions/0024."""


@pytest.mark.parametrize("name", sorted(versions.tried().keys() - WITHOUT_A_PART))
def test_the_fingerprint_has_it(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tried = fingerprint.library_parts()
    installed[name] = "0.0.9"
    if name == "torch":  # which says its build, too
        monkeypatch.setattr("torch.__version__", installed["torch"])
    assert part_differences(tried, fingerprint.library_parts()) == [f"{name} {tried[name]} → 0.0.9"]


def test_a_library_that_transformers_computes_with_unasked_is_a_part(installed: dict[str, str]) -> None:
    tried = fingerprint.library_parts()
    installed["mamba-ssm"] = "2.2.6"
    assert part_differences(tried, fingerprint.library_parts()) == ["only in the second: mamba-ssm 2.2.6"]


def test_the_file_travels_with_the_package() -> None:
    assert Path(versions.__file__).with_name("tried.json").is_file()
    assert {"torch", "transformers", "tokenizers", "llguidance", "jinja2", "numpy"} <= versions.tried().keys()
