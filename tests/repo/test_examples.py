"""Every example runs, against a real server with the random model, and says what its reader is told it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "server"))

from live_server import start  # noqa: E402

CURL = shutil.which("curl")

EXAMPLES = {
    "chat": ["text:", "ended by: length", "tokens: 20 + 12", "fingerprint: vb-"],
    "stream": ["24 tokens in", "the same as without stream: yes"],
    "reproduce": ["keep these: seed", "4 of 4 replays"],
    "choices_and_logprobs": ["choice 0:", "choice 2:", "12 tokens", "the bytes join to the text"],
    "stop_and_bias": ["stopped:", "(stop)", "banned:", "forced:"],
    "prove_a_reply": [
        "receipt of chatcmpl-",
        "as it is: identical: all 12 tokens",
        "with another token: refuted: at position 6",
    ],
    "experiment": ["seed 3, temperature 1.0", "smallest margin", "6 of 6 identical"],
    "score_texts": ["' Mary'", "' table'", "each alone has the same bits: yes"],
    "script": ["the law holds here:", "chat:", "again:", "continued: 'a seed chooses'"],
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "models.yaml").write_text("models:\n  - {id: noise, builtin: noise}\n", encoding="utf-8")
    with start([], folder) as server:
        yield f"{server.url}/v1"


def test_no_example_is_left_out() -> None:
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_on_a_screen_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"python examples/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_says(name: str, url: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "VERBATIM_URL": url, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in EXAMPLES[name]:
        assert words in done.stdout


@pytest.mark.skipif(CURL is None, reason="the proof in README.md calls curl, which is not installed")
def test_the_proof_in_the_readme(tmp_path: Path) -> None:
    """The block of shell commands on README's first screen, as it stands there, but for the address."""
    [proof] = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    (tmp_path / "models.yaml").write_text("models:\n  - {id: demo, builtin: demo}\n", encoding="utf-8")
    with start([], tmp_path) as server:
        script = proof.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(
            ["bash", "-euc", script], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
        )
    assert done.stdout.endswith("equal\n"), done.stdout + done.stderr
    assert '"logprob": -' in (tmp_path / "alone.json").read_text(encoding="utf-8")
