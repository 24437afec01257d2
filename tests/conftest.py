"""What all tests share. The environment is prepared first: some of it is read once, by the first matrix product."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from engine.checkpoints.checkpoint import prepare_environment
from engine.serving import opening
from engine.serving.models import slot as slots

if TYPE_CHECKING:
    from engine.compute.cpu.kernels import Kernels

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# A hundred processes are started that import the engine: each would compile all its modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Tiny models: a second thread only waits for the first. The law's tests ask for one and two themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_environment(pull=False)
if not Path("/dev/nvidiactl").exists():  # triton reads it once, when it is imported; a GPU runs the kernels itself
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A desk explores; a clean checkout runs the same examples every time, so that a red run is a change's own.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """`tiny(family)`: the folder of a tiny checkpoint, written once for the whole run."""
    import tiny_models

    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tiny_models.write(tmp_path_factory.mktemp("tiny") / family, family)
        return folders[family]

    return folder


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A command that runs in this process sets up its log; what pytest set up is back after the test."""
    root, hooks = logging.getLogger(), (threading.excepthook, sys.unraisablehook)
    own = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    yield
    threading.excepthook, sys.unraisablehook = hooks
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in own:
            root.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def threads_by_default() -> Iterator[None]:
    """Engines of entries that do not name their `isolation` run on threads: a process takes seconds to start, and tests
    reach into an engine. What differs is tested in tests/engine/serving, and by servers that tests start.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            opening,
            "_has_its_own_process",
            lambda config: config.isolation == "process" and "isolation" in config.model_fields_set,
        )
        patch.setattr(slots.Slot, "has_own_process", property(lambda slot: opening._has_its_own_process(slot.config)))
        yield


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The compiled kernels; tests of them are skipped where there are none."""
    from engine.compute.cpu.kernels import Kernels, NoKernels

    try:
        return Kernels.load()
    except NoKernels as error:
        pytest.skip(f"no compiled kernels on this machine: {error}")


_INSTRUCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: (what the processor must have, how to compile for it)
    "AVX2": ("avx2", ("-march=x86-64-v3",)),
    "AVX2, VNNI written out": ("avx2", ("-march=x86-64-v3", "-DVERBATIM_EMULATE_VNNI")),
    # AVX-512's layout of whole numbers in groups, each vector as two.
    "AVX2, panels of AVX-512 written out": ("avx2", ("-march=x86-64-v3", "-DVERBATIM_EMULATE_WIDE")),
    "AVX2, VNNI, panels of AVX-512 written out": (
        "avx2",
        ("-march=x86-64-v3", "-DVERBATIM_EMULATE_WIDE", "-DVERBATIM_EMULATE_VNNI"),
    ),
    # A matrix unit's tiles, for products of many rows.
    "AVX2, matrix unit written out": ("avx2", ("-march=x86-64-v3", "-DVERBATIM_EMULATE_MATRIX")),
    "AVX2, VNNI, panels of AVX-512, matrix unit written out": (
        "avx2",
        ("-march=x86-64-v3", "-DVERBATIM_EMULATE_WIDE", "-DVERBATIM_EMULATE_VNNI", "-DVERBATIM_EMULATE_MATRIX"),
    ),
    "AVX2, VNNI": ("avx_vnni", ("-march=x86-64-v3", "-mavxvnni")),
    "AVX-512": ("avx512vl", ("-march=x86-64-v4",)),
    "AVX-512, VNNI": ("avx512_vnni", ("-march=x86-64-v4", "-mavx512vnni")),
    "AVX-512, VNNI, matrix unit": (
        "amx_int8",
        ("-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-UVERBATIM_NO_MATRIX_UNIT"),
    ),
}


_EMULATED: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: (the processor to emulate, which has no more than what is named; how to compile for it)
    "NEON": ("cortex-a53", ("-march=armv8-a", "-O1")),
    "NEON, dot products": ("cortex-a76", ("-march=armv8.2-a+dotprod", "-O1")),
    "NEON, dot products, I8MM": ("max", ("-march=armv8.6-a", "-O3")),
    "NEON, dot products, I8MM, SVE": ("max", ("-march=armv9-a+i8mm", "-O3")),  # which the compiler may use
}


@pytest.fixture(scope="session", params=[*_INSTRUCTIONS, *_EMULATED])
def other_kernels(
    request: pytest.FixtureRequest, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kernels]:
    """The kernels for one instruction set, where this processor has it, or in an emulated processor of ARM."""
    from engine.compute.cpu.kernels import Kernels

    folder = tmp_path_factory.mktemp("others")
    if request.param in _EMULATED:
        from emulated_library import emulated_kernels

        with emulated_kernels(folder, *_EMULATED[request.param]) as found:
            assert found.target == request.param.removesuffix(", SVE")
            yield found
        return
    needed, flags = _INSTRUCTIONS[request.param]
    if needed not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor lacks {needed}")
    found = Kernels.load(folder, (*flags, "-O1"))  # quick to compile, and the same bits
    if found.matrix_unit.fault and "written out" not in request.param:
        pytest.skip(f"the matrix unit is announced, and does not work here: {found.matrix_unit.fault}")
    name = request.param.removesuffix(" written out").removesuffix(", matrix unit").removesuffix(", panels of AVX-512")
    assert (found.target, found.matrix_unit.used) == (name, "matrix unit" in request.param)
    yield found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers and templates; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real tokenizers and templates are not beside this checkout")
    return SHARED


LONG = (
    "server/bundle/test_bundle_install.py",
    "zoo/test_architectures.py",
    "repo/test_benchmarks.py",
    "engine/compute/cuda/test_interpreted_model.py",
    "engine/compute/cuda/test_attention_compiles.py",
    "engine/compute/cuda/test_linear_compiled.py",
    "engine/serving/test_model_process.py",
    "server/test_live.py",
    "server/test_live_models.py",
    "server/test_live_receipts.py",
    "server/test_faults.py",
    "server/batch/test_batch_output.py",
    "repo/test_packaging.py",
)
"""Files of few tests that take long. They come first, or one process would be alone with the last."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files that have most tests
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
