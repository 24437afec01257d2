"""What is known of a model before it is loaded, compared with what it is then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import adapters_for_tests
import pytest

from engine import ModelConfig, Registry


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_has_the_name_that_its_receipts_have(tiny: Callable[[str], Path], tmp_path: Path, merge: bool) -> None:
    """By it a receipt finds the model that it may be checked with, and has it loaded."""
    base = tiny("llama")
    adapters = [
        {"name": name, "path": adapters_for_tests.write(tmp_path / name, base), "merge": merge}
        for name in ("sql", "poems")[: 1 if merge else 2]
    ]
    config = ModelConfig(id="m", path=base, load="on_demand", adapters=adapters)  # type: ignore[arg-type]
    with contextlib.closing(Registry([config])) as registry:
        registry.start()
        deadline = time.monotonic() + 60
        while not all(one.outline for one in registry.list()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = {one.id: one.outline.name for one in registry.list() if one.outline}
        asyncio.run(registry.load("m"))
        assert before == {one.id: one.info.manifest.name for one in registry.list() if one.info}
