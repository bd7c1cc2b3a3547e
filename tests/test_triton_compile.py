"""Every kernel compiles for GPUs that are not here: nothing spills, and the matrix units, the copy
engines and the shared memory are used as meant.

The interpreter shows values; this shows resources. Failures name case, kernel, target and figure.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from entropy_kernels import device as gpu
from tests.ahead_of_time import TARGETS, Launch

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "gpu"
TRITON = ROOT / "entropy_kernels" / "_triton"
# Together they take about two minutes on two cores the first time; the first test waits for them.
WORKERS = 2
pytestmark = pytest.mark.timeout(1800)
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
Compiled = Callable[[str], list[Launch]]


@pytest.fixture(scope="module")
def compiled(request):
    """The launches of a target, compiled in a process of its own; all wanted targets start at once.

    Triton's cache stays for the next run.
    """
    mine = [item for item in request.session.items if item.path == request.path]
    names = {item.callspec.params.get("target") for item in mine if hasattr(item, "callspec")}
    cache = request.config.cache.mkdir("triton")
    with ThreadPoolExecutor(WORKERS) as pool:
        found: dict[str, Future[list[Launch]]] = {
            name: pool.submit(_compile, name, cache) for name in TARGETS if name in names
        }
        yield lambda name: found[name].result()


def _compile(name: str, cache: Path) -> list[Launch]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ahead_of_time", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Launch(**json.loads(line)) for line in done.stdout.splitlines()]


def _assert_all(target: str, launches: list[Launch], good: Callable[[Launch], bool]) -> None:
    bad = [f"{x.kernel} of {x.case}: {x.error or x.figures}" for x in launches if not good(x)]
    assert not bad, f"{len(bad)} of {len(launches)} launches on {target}:\n" + "\n".join(bad)


@pytest.mark.parametrize("target", TARGETS)
def test_everything_compiles(compiled: Compiled, target: str):
    assert compiled(target), f"nothing was launched on {target}"
    _assert_all(target, compiled(target), lambda x: not x.error)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled: Compiled, target: str):
    spilled = ("LDL", "STL", "stack", "spills", "scratch")

    def good(x: Launch) -> bool:
        return not any(x.figures.get(name, 0) for name in spilled)

    _assert_all(target, compiled(target), good)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(compiled: Compiled, target: str):
    limit = gpu.shared_memory(target)
    _assert_all(target, compiled(target), lambda x: x.figures.get("shared", 0) <= limit)


@pytest.mark.parametrize("target", TARGETS)
def test_addresses_are_known_to_be_aligned(compiled: Compiled, target: str):
    # Without known alignment, loads are 2 or 4 bytes wide.
    _assert_all(target, compiled(target), lambda x: all(x.divisible))


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_products_take_the_matrix_units(compiled: Compiled, target: str):
    wanted = {"sm_80": "HMMA", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    name = wanted.get(target, "v_mfma")
    products = [x for x in compiled(target) if x.dots]
    assert products, f"no 16-bit product on {target}"
    _assert_all(target, products, lambda x: x.figures.get(name, 0) > 0)
    if target != "sm_80":
        _assert_all(target, products, lambda x: x.figures.get("mma.sync", 0) == 0)


@pytest.mark.parametrize("target", ["sm_80"])
def test_loads_are_asynchronous_on_ampere(compiled: Compiled, target: str):
    products = [x for x in compiled(target) if x.dots]
    _assert_all(target, products, lambda x: x.figures.get("LDGSTS", 0) > 0)


@pytest.mark.parametrize("target", NVIDIA)
def test_descriptors_become_bulk_copies(compiled: Compiled, target: str):
    described = [x for x in compiled(target) if x.descriptors]
    assert bool(described) == gpu.has_tma(target)
    _assert_all(target, described, lambda x: x.figures.get("cp.async.bulk.tensor", 0) > 0)


@pytest.mark.parametrize("target", NVIDIA)
def test_registers_move_between_warps_only_where_warps_are_specialised(
    compiled: Compiled, target: str
):
    def good(x: Launch) -> bool:
        specialised = "tma_ws" in x.case and x.dots
        return (x.figures.get("setmaxnreg", 0) > 0) == specialised

    _assert_all(target, compiled(target), good)


@pytest.mark.parametrize("target", ["sm_90"])
def test_two_programs_of_the_split_kernel_fit_one_multiprocessor(compiled: Compiled, target: str):
    cases = [x for x in compiled(target) if x.case.startswith("forward tma_split")]
    split = [x for x in cases if x.kernel == "forward_tma_kernel"]
    assert split

    def good(x: Launch) -> bool:
        registers = 2 * 32 * x.figures["warps"] * x.figures["registers"]
        return registers <= 1 << 16 and 2 * (x.figures["shared"] + 1024) <= 228 << 10

    _assert_all(target, split, good)


def test_every_verified_architecture_has_its_record():
    for architecture in gpu.VERIFIED:
        records = sorted(RECORDS.glob(f"correctness-{architecture}-*.json"))
        assert records, f"{architecture}: {RECORDS} has no record of its correctness run"
        for path in records:
            record = json.loads(path.read_text())
            assert record["architecture"] == architecture
            assert record["passed"]
            assert record["failed"] == []


@pytest.mark.parametrize(
    "path", sorted(TRITON.rglob("*.py")), ids=lambda path: str(path.relative_to(TRITON))
)
def test_names_tell_launchers_kernels_and_device_functions_apart(path: Path):
    functions = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
    jitted = [x.name for x in functions if "triton.jit" in map(ast.unparse, x.decorator_list)]
    kernels = {name for name in jitted if name.endswith("_kernel")}
    private = {name for name in jitted if name.startswith("_")}
    if path.stem.endswith(("kernel", "kernels")):
        assert kernels
        assert set(jitted) == {x.name for x in functions} == kernels | private
    elif path.stem.endswith("_functions"):
        assert set(jitted) == {x.name for x in functions}
        assert not kernels
    else:
        assert not jitted
