"""Compile Triton kernels for GPUs that are not there, and read off what each needs: registers, memory, instructions.

`compile_variants` does so in a process of its own, without the interpreter that the tests run kernels in. It reads the
variants from a module beside this file, whose function `variants()` lists them, and which may import triton.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LARGEST_SHARED = 101_376
"""Bytes of shared memory that a block may have on every architecture: 99 KiB (sm_86, sm_89, sm_120)."""
CAPABILITIES = (80, 86, 89, 90, 120)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel.

    Attributes:
        name: unique in its module; kernel: a function under `@triton.jit`.
        signature: type of each argument that is not a constant, such as `*bf16`, `i32` or `fp32`.
        constants: value of each `tl.constexpr`.
        divisible: names of numbers that are multiples of 16. Pointers always are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    divisible: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread, at most 255; stack: bytes per thread, above 0 where registers spill.
        shared: bytes per block; mma: the instructions that multiply matrices, such as `HMMA.16816.F32.BF16`.
    """

    registers: int
    stack: int
    shared: int
    mma: tuple[str, ...]


def compile_kernel(
    kernel: Any,
    capability: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    divisible: Collection[str] = (),
) -> Compiled:
    """Compile a kernel for a GPU of `capability` (89 for 8.9), as it is launched: without contraction of a*b+c."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [n for n in names if n not in constants and (n in divisible or signature[n].startswith("*"))]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    mma = sorted(set(re.findall(r"\b(?:[HIQD]|HG|UTC\w*)MMA[\w.]*", code)))
    return Compiled(int(found[1]), int(found[2]), compiled.metadata.shared, tuple(mma))


def compile_variants(
    module: str, names: Iterable[str], capabilities: Iterable[int], cache: Path
) -> dict[tuple[str, int], Compiled]:
    """Compile variants of a module in a process of its own.

    Args:
        module: name of a module in this folder, with a function `variants() -> Iterable[Variant]`.
        names: of the variants to compile; cache: a folder for Triton's files.

    Returns:
        What each needs, by name and capability.
    """
    names, capabilities = list(names), list(capabilities)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[4]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, module, ",".join(map(str, capabilities)), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    needs = {(n["name"], n["capability"]): Compiled(**n["needs"] | {"mma": tuple(n["needs"]["mma"])}) for n in lines}
    assert set(needs) == {(name, capability) for name in names for capability in capabilities}
    return needs


def main(arguments: Sequence[str]) -> None:
    """Print one line of JSON per variant and GPU: `MODULE CAPABILITY,… [NAME…]`, without names for all."""
    module, capabilities, *names = arguments
    for variant in importlib.import_module(module).variants():
        for capability in map(int, capabilities.split(",")) if not names or variant.name in names else ():
            needs = compile_kernel(
                variant.kernel,
                capability,
                variant.signature,
                variant.constants,
                variant.warps,
                variant.stages,
                variant.divisible,
            )
            print(json.dumps({"name": variant.name, "capability": capability, "needs": asdict(needs)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
