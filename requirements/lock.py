"""Write the lock: uv.lock from pyproject.toml, the hashed requirements that pip takes, and engine/loading/tried.json.

    python requirements/lock.py [UV] [ARGUMENT …]    # arguments go to `uv lock`: --upgrade, --upgrade-package NAME

Knows one thing that uv does not: the CPU builds of torch for Linux lie in an index of their own. The hashes of their
wheels stand in torch-cpu.sha256. For another release copy them from https://download.pytorch.org/whl/cpu/torch/; where
those of 2.13.0 come from stands in docs/decisions/0016.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TRIED = (
    "accelerate",
    "gguf",
    "huggingface-hub",
    "jinja2",
    "jsonschema",
    "llguidance",
    "numpy",
    "regex",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
"""What the bits or the meaning of a reply depend on. An installed server compares them with what was tried."""
_CUDA = re.compile(r"torch|triton|(nvidia|cuda)-.+")
_NOTE = "# Written by `make lock` from uv.lock. Do not edit.\n"


def main(uv: str, *arguments: str) -> None:
    """Lock, export, record."""
    subprocess.run([uv, "lock", "--no-config", *arguments], cwd=ROOT, check=True)
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    names = {package["name"] for package in packages if "registry" in package["source"]}
    cuda = {name for name in names if _CUDA.fullmatch(name)}
    for file, extras, left_out in (
        ("runtime.txt", ("--extra", "gguf", "--extra", "postgres"), cuda),
        ("dev.txt", ("--all-extras",), cuda),
        ("torch-cu130.txt", (), names - cuda),
    ):
        text = _NOTE + _export(uv, extras, left_out)
        (HERE / file).write_text(text, encoding="utf-8")
    (HERE / "torch-cpu.txt").write_text(cpu_build(packages), encoding="utf-8")
    (HERE / "triton.txt").write_text(interpreter(packages), encoding="utf-8")
    (ROOT / "engine" / "loading" / "tried.json").write_text(tried(packages), encoding="utf-8")


def tried(packages: list[dict[str, Any]]) -> str:
    """engine/loading/tried.json: the locked releases of what replies depend on, a line each."""
    releases = {name: sorted(p["version"] for p in packages if p["name"] == name) for name in TRIED}
    return (
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in releases.items()) + "\n}\n"
    )


def _export(uv: str, extras: tuple[str, ...], left_out: set[str]) -> str:
    """uv's own requirements.txt with hashes, without some packages."""
    flags = [flag for name in sorted(left_out) for flag in ("--no-emit-package", name)]
    command = [uv, "export", "--no-config", "--frozen", "--quiet", "--no-header", "--no-annotate", "--no-emit-project"]
    return subprocess.run([*command, *extras, *flags], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def cpu_build(packages: list[dict[str, Any]]) -> str:
    """torch-cpu.txt: the `+cpu` wheels on Linux; elsewhere the package index has no other build."""
    [torch] = [package for package in packages if package["name"] == "torch"]
    lines = (HERE / "torch-cpu.sha256").read_text(encoding="utf-8").split("\n")
    linux = dict(reversed(line.split()) for line in lines if line)
    version = f"{torch['version']}+cpu"
    if not all(name.startswith(f"torch-{version}-") for name in linux):
        raise SystemExit(
            f"requirements/torch-cpu.sha256 is not of torch {version}: "
            f"copy the hashes of its manylinux wheels from {CPU_INDEX}/torch/"
        )
    others = [wheel["hash"] for wheel in torch["wheels"] if "linux" not in wheel["url"]]
    return "".join(
        (
            _NOTE,
            "# Another index can only offer what has one of these hashes.\n",
            f"--extra-index-url {CPU_INDEX}\n",
            _requirement(f"torch=={version} ; sys_platform == 'linux'", [f"sha256:{d}" for d in linux.values()]),
            _requirement(f"torch=={torch['version']} ; sys_platform != 'linux'", others),
        )
    )


def interpreter(packages: list[dict[str, Any]]) -> str:
    """triton.txt: the release of the CUDA build, for tests that run its kernels interpreted beside the CPU build."""
    [triton] = [package for package in packages if package["name"] == "triton"]
    text = f"triton=={triton['version']} ; sys_platform == 'linux'"
    return _NOTE + _requirement(text, [wheel["hash"] for wheel in triton["wheels"]])


def _requirement(text: str, hashes: list[str]) -> str:
    return " \\\n".join([text, *(f"    --hash={digest}" for digest in sorted(hashes))]) + "\n"


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["uv"]))
