"""The layers are a test: who may import whom, and what is absent on purpose."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    {"errors", "types", "config", "versions", "confined", "confined_child"},
    {
        "sequence",
        "speculation",
        "block_pool",
        "scheduler",
        "chat_prompt",
        "chat_template",
        "content_guard",
        "prompt_encoder",
        "template_budget",
        "template_filters",
        "template_sandbox",
        "template_tree",
        "template_trial",
        "expression_trial",
        "detokenizer",
        "dialect",
        "grammar",
        "mask_worker",
        "grammar_paths",
        "grammar_trial",
        "json_schema",
        "reasoning",
        "reply_form",
        "reply_parser",
        "response_template",
        "tool_calls",
        "tool_format",
        "tool_grammar",
        "stop_strings",
        "standin",
        "kernel_calls",
        "kernel_trial",
        "kernel_file",
    },
    {
        "rng",
        "logits",
        "sampler",
        "attention_mask",
        "row_safe",
        "rotary",
        "kv_cache",
        "attention",
        "native",
        "linear",
        "pointwise",
        "decoder_layer",
        "model_runner",
    },
    {
        "checkpoint",
        "claims",
        "json_files",
        "safetensors_file",
        "gguf_file",
        "gguf_model",
        "gguf_tokenizer",
        "reading",
        "fingerprint",
        "quantized",
        "attention_trial",
        "selftest",
        "loader",
        "preparation",
        "core",
    },
    {"async_engine", "registry", "llm", "turns"},
    {"__init__"},
)
NO_TORCH = LAYERS[0] | LAYERS[1]
FREE_OF_TIME_AND_THREADS = LAYERS[0] | LAYERS[1] | LAYERS[2] | {"core", "attention_trial", "selftest", "preparation"}
# A process, a clock and who waits for it are what these are.
FREE_OF_TIME_AND_THREADS -= {"confined", "confined_child", "grammar_trial", "mask_worker"}
ENGINE = sorted((ROOT / "engine").glob("*.py"))
SERVER = sorted((ROOT / "server").glob("*.py"))


def _level(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def _imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Dotted names of imported modules; `everywhere` counts those inside functions, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "engine":
                found |= {f"engine.{alias.name}" for alias in node.names if (ROOT / f"engine/{alias.name}.py").exists()}
    return found


def test_every_file_has_a_layer() -> None:
    assert {p.stem for p in ENGINE} == set().union(*LAYERS)


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: p.stem)
def test_a_file_imports_only_its_own_or_lower_layers(path: Path) -> None:
    for name in _imports(path):
        if name.startswith("engine."):
            assert _level(name.split(".")[1]) <= _level(path.stem), f"{path.stem} imports {name}"
        assert not name.startswith("server"), f"{path.stem} knows the server"


@pytest.mark.parametrize("path", [p for p in ENGINE if p.stem in NO_TORCH], ids=lambda p: p.stem)
def test_pure_files_load_no_torch(path: Path) -> None:
    assert not {"torch", "transformers"} & {n.split(".")[0] for n in _imports(path, everywhere=False)}


@pytest.mark.parametrize("path", [p for p in ENGINE if p.stem in FREE_OF_TIME_AND_THREADS], ids=lambda p: p.stem)
def test_the_core_has_no_clock_no_thread_no_network(path: Path) -> None:
    banned = {"time", "threading", "asyncio", "socket", "random", "http", "urllib", "requests", "httpx"}
    assert not banned & {name.split(".")[0] for name in _imports(path)}


@pytest.mark.parametrize("path", SERVER, ids=lambda p: p.stem)
def test_the_server_sees_only_the_engine_root(path: Path) -> None:
    names = _imports(path)
    inner = {n for n in names if n.startswith("engine.")}
    assert not inner, f"{path.stem} reaches into {inner}"
    assert not {"torch", "transformers", "accelerate"} & {n.split(".")[0] for n in names}


@pytest.mark.parametrize("path", [*ENGINE, *SERVER], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_no_mutable_module_state(path: Path) -> None:
    """Two engines in one process must not share anything that changes. Tables in capitals are constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno} uses global"
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        mutable = isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
        for target in targets:
            if isinstance(target, ast.Name) and mutable:
                constant = target.id.lstrip("_").isupper() or target.id == "__all__"
                assert constant, f"{path.name}:{node.lineno}: {target.id} is mutable module state"


@pytest.mark.parametrize("path", [*ENGINE, *SERVER], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring) > 40


def test_the_public_face_is_what_it_says() -> None:
    import engine

    assert set(engine._MODULE_OF) == set(engine.__all__) == set(dir(engine))
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        engine.nope  # noqa: B018


@pytest.mark.parametrize(
    "module", ["engine", "server.cli", "server.schema", "engine.scheduler", "engine.chat_template"]
)
def test_a_light_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
