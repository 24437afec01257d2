"""Helpers for tests of checkpoints that are odd or damaged: change a JSON file, and expect a refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import LoadError, ModelConfig
from engine.loading.loader import load


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file, which need not exist."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **fields}))


def refused(path: Path, message: str) -> LoadError:
    """Load a checkpoint that must be refused, in one line of a bearable length that matches `message`."""
    with pytest.raises(LoadError, match=message) as caught:
        load(ModelConfig(id="m", path=path))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 800
    return caught.value
