"""The kernels' team of threads: whoever calls, with however many threads, in whichever process, gets the same bits.

Each case runs in a process of its own, because a team lives as long as its process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from emulated_library import compile_for_arm, emulated

from engine.compute.cpu import kernels as source
from engine.compute.cpu.kernels import Kernels

_HEAD = """
    import os, random, sys, threading, time
    import torch
    from engine.compute.cpu.kernels import Kernels
    kernels = Kernels.load()
    torch.manual_seed(0)

    def of(kind, rows, columns, depth):
        product = kernels.group([kernels.pack(torch.randn(columns, depth), torch.randn(columns), kind)])
        x = torch.randn(rows, depth)
        torch.set_num_threads(1)
        return product, x, product(x)[0].clone()

    def same(case, threads):
        product, x, truth = case
        torch.set_num_threads(threads)
        return bytes(product(x)[0].numpy().data) == bytes(truth.numpy().data)
"""


def _run(code: str, seconds: float = 60) -> str:
    """Run the code in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_HEAD) + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_many_callers_at_once_with_any_numbers_of_threads_and_forks_in_between(kernels: Kernels) -> None:
    """Callers share the workers; a forked child has none of them, also if others were computing when it was forked."""
    _run("""
        shapes = [(1, 700, 300), (2, 90, 1100), (7, 333, 130), (13, 64, 2049), (40, 200, 257), (1, 16, 16), (0, 40, 40)]
        cases = [of(kind, *shape) for kind in ("exact", "int8") for shape in shapes]
        wrong = []

        def call(seed):
            rng = random.Random(seed)
            for _ in range(150):
                case, threads = rng.choice(cases), rng.choice((1, 2, 3, 5, 9))
                if not same(case, threads):
                    wrong.append((seed, threads))

        def fork():
            child = os.fork()
            if child == 0:
                os._exit(0 if all(same(case, threads) for case in cases for threads in (3, 1, 5)) else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        for caller in callers:
            caller.start()
        codes = [fork() for _ in range(4)]
        for caller in callers:
            caller.join()
        codes.append(fork())
        assert not wrong and codes == [0] * 5, (wrong, codes)
    """)


def test_more_calls_at_once_than_are_helped(kernels: Kernels) -> None:
    """The team helps 32 calls at once; those beyond compute alone."""
    _run("""
        case, wrong = of("exact", 9, 400, 900), []
        gate = threading.Barrier(48)

        def call():
            gate.wait()
            for _ in range(5):
                if not same(case, 2):
                    wrong.append(1)

        callers = [threading.Thread(target=call) for _ in range(48)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_team_for_all_that_takes_no_signals_and_ends_with_the_process(kernels: Kernels) -> None:
    """As many workers as the most threads asked for, less the caller: not as many again for each caller or model."""
    out = _run("""
        one, other = of("exact", 3, 500, 500), of("int8", 3, 500, 500)
        callers = [threading.Thread(target=same, args=(case, n)) for case in (one, other) for n in (2, 4, 3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        for task in os.listdir("/proc/self/task"):
            try:
                lines = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status"))
            except OSError:  # one of torch's threads, which ended just now
                continue
            if lines["Name"].strip().startswith("kernels-"):
                print(lines["SigBlk"].strip())
    """)
    # SIGKILL, SIGSTOP and the two signals that the C library keeps for itself cannot be blocked. A thread's own faults
    # must not be: then no crash reporter would see them.
    never = 1 << 8 | 1 << 18 | 1 << 31 | 1 << 32
    own = sum(1 << (number - 1) for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL))
    assert [int(mask, 16) | never for mask in out.split()] == [2**64 - 1 - own] * 3


def test_nobody_spins_when_there_is_nothing_to_do(kernels: Kernels) -> None:
    out = _run("""
        case = of("exact", 8, 500, 500)
        assert same(case, 4)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - before)
    """)
    assert float(out) < 0.2, "seconds of three workers in half a second"


def test_the_bits_do_not_depend_on_how_a_caller_treats_tiny_numbers(kernels: Kernels) -> None:
    """A library may leave a thread in a mode in which denormal numbers are zeros; workers would compute otherwise."""
    out = _run("""
        product = kernels.group([kernels.pack(torch.full((600, 64), 2.0**-70), None)])
        x = torch.full((3, 64), 2.0**-75)
        found = []
        for flush in (False, True):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.set_flush_denormal(flush)
                found.append(bytes(product(x)[0].numpy().data))
                assert (float(torch.tensor(2.0**-130) * 1.0) == 0.0) == flush, "the caller's own mode is left to it"
        print(len(set(found)), any(found[0]))
    """)
    assert out.split() == ["1", "True"]


def test_without_workers_the_caller_does_all(kernels: Kernels, tmp_path: Path) -> None:
    """A container may refuse to start threads."""
    alone = Kernels.load(tmp_path, ("-O0", "-DVERBATIM_REFUSE_THREADS"))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x, weight = torch.randn(9, 300), torch.randn(200, 300)
        for kind in ("exact", "int8"):
            one, other = (k.group([k.pack(weight, None, kind)])(x)[0] for k in (alone, kernels))
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


_TRIAL = Path(__file__).with_name("team_trial.c")
_STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
_FLAGS = ("-O2", "-pthread", *_STRICT, f"-I{Path(source.__file__).parent / 'native'}")


@pytest.fixture(scope="module", params=["", "-U__linux__"], ids=["futex", "condition variables"])
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`team_trial.c`, compiled for one of the two ways to sleep; with every warning of the strict language an error."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.name != "posix" or not compiler:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("team") / "trial"
    subprocess.run([compiler, *_FLAGS, *request.param.split(), str(_TRIAL), "-o", str(target)], check=True, timeout=60)
    return target


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("many 40 6", id="each unit is done once, after all of the phase before, in forked children, too"),
        pytest.param("turns", id="a call that always has work does not keep the workers from another"),
        pytest.param("modes", id="all threads compute in the usual mode, and the caller keeps its own"),
    ],
)
def test_the_team_by_itself(trial: Path, what: str) -> None:
    done = subprocess.run([str(trial), *what.split()], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["many 3 0", "turns", "modes"])
def test_the_team_in_an_emulated_processor_of_arm(tmp_path: Path, what: str) -> None:
    """Its instructions, not its order of memory: the emulator is as strict as the machine that it runs on.

    It cannot fork among threads.
    """
    target = compile_for_arm(_TRIAL, tmp_path / "trial", *_FLAGS)
    command = emulated(target, "cortex-a76", *what.split())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_torchs_own_threads_do_not_spin_for_long_on_the_teams_processors() -> None:
    """Set before torch is imported, and only if nobody has said how they wait."""
    code = "import os, engine; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def told(**given: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env={**plain, **given}, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert int(told()) <= 10_000
    assert told(OMP_WAIT_POLICY="active") == "None"
    assert told(GOMP_SPINCOUNT="7") == "7"
