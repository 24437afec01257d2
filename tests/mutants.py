"""Tries the tests: breaks the code in small ways with mutmut and counts the breaks that no test notices.

`make mutants` runs it with a virtual environment of its own; it knows mutmut's files and nothing of the project but the
table below. The copy that is broken lies under build/mutants. A sample is drawn with a fixed seed, so a second run
tries the same mutants as long as the file is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
TESTS = {
    "engine/scheduling/scheduler.py": "tests/engine/scheduling/test_scheduler.py",
    "engine/scheduling/block_pool.py": "tests/engine/scheduling/test_block_pool.py",
    "engine/sampling/sampler.py": "tests/engine/sampling/test_sampler.py",
    "server/accounts/charging.py": "tests/server/accounts/test_keys.py",
    "engine/replies/tool_calls/reader.py": "tests/engine/replies/test_tool_calls.py",
    "engine/replies/tool_calls/json_notation.py": "tests/engine/replies/test_tool_calls.py",
    "engine/replies/tool_calls/pairs_notation.py": "tests/engine/replies/test_tool_calls.py",
}
"""The files whose mutants are tried, and their own quick tests."""
LEFT_OUT = "slow or gpu or sweep"
SLOW_CASES = "not proportion and not 151936"
"""Tests of speed, which fail in a copy that counts calls, and the widest vocabulary."""


def prepare(file: str, tests: str) -> None:
    """Copy the checkout and write mutmut's configuration for one file into it."""
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    shown = ["demo", "docs", "engine", "examples", "server", "models.yaml", "setup.py", "README.md"]
    lines = [
        "[tool.mutmut]",
        'source_paths = ["engine", "server"]',
        f"only_mutate = {json.dumps([file])}",
        f"also_copy = {json.dumps(shown)}",
        f"pytest_add_cli_args = {json.dumps(['-m', f'not ({LEFT_OUT})', '-p', 'no:cacheprovider', '-k', SLOW_CASES])}",
        f"pytest_add_cli_args_test_selection = {json.dumps([tests])}",
        "timeout_multiplier = 3.0",
        "timeout_constant = 10.0",
    ]
    with (COPY / "pyproject.toml").open("a", encoding="utf-8") as configuration:
        configuration.write("\n" + "\n".join(lines) + "\n")


def mutmut(*arguments: str) -> str:
    environment = {**os.environ, "CI": "1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, check=False).stdout


def outcomes(file: str) -> dict[str, int | None]:
    """The exit status of the tests by mutant; None where it was not tried."""
    meta = COPY / "mutants" / f"{file}.meta"
    found: dict[str, int | None] = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def try_file(file: str, tests: str, size: int) -> None:
    prepare(file, tests)
    mutmut("run", "--max-children", "1", "none.of.them")  # writes the mutants and finds out which test runs what
    names = sorted(outcomes(file))
    chosen = random.Random(1).sample(names, min(size or len(names), len(names)))
    mutmut("run", "--max-children", "1", *chosen)
    ended = outcomes(file)
    survivors = [name for name in chosen if ended[name] in (0, 33)]  # 33: no test runs it
    print(f"{file}: {len(names)} mutants, {len(chosen)} tried, {len(chosen) - len(survivors)} killed")
    print("  by exit status:", dict(Counter(ended[name] for name in chosen)))
    for name in survivors:
        changed = [
            line for line in mutmut("show", name).splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
        ]
        print(f"  {name}", *changed, sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[*TESTS], help="default: all of the table")
    parser.add_argument("--size", type=int, default=120, help="mutants of each file; 0: all")
    arguments = parser.parse_args()
    for file in arguments.files:
        try_file(file, TESTS[file], arguments.size)


if __name__ == "__main__":
    main()
