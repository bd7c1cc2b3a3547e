"""Every kernel compiles for GPUs that are not here: nothing spills, and the matrix units, the copy
engines and the shared memory are used as meant.

The interpreter shows values; this shows resources. Failures name kernel, case, target and figures.
`make test-compile` runs this file, with the environment's Triton or another version.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import costs
from entropy_kernels import device
from tests.ahead_of_time import PROCESSORS, TARGETS, Launch

ROOT = Path(__file__).parents[1]
WORKERS = 2
pytestmark = pytest.mark.timeout(3600)
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
# What multiplies 16-bit matrices.
UNITS = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
Compiled = Callable[[str], list[Launch]]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
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
    done = _run(cache, "tests.ahead_of_time", name)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Launch(**json.loads(line)) for line in done.stdout.splitlines()]


def _run(cache: Path, *module: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _assert_all(target: str, launches: list[Launch], good: Callable[[Launch], bool]) -> None:
    bad = [str(launch) for launch in launches if not good(launch)]
    assert not bad, f"{len(bad)} of {len(launches)} kernels on {target}:\n" + "\n".join(bad)


def _products(launches: list[Launch]) -> list[Launch]:
    products = [x for x in launches if x.dots]
    assert products, "no 16-bit product was compiled"
    return products


@pytest.mark.parametrize("target", TARGETS)
def test_everything_compiles(compiled: Compiled, target: str):
    ops = {"forward", "dlogits", "selection", "ratio_loss", "support", "entropy_from_logits"}
    assert {x.op for x in compiled(target)} == ops
    _assert_all(target, compiled(target), lambda x: not x.error)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled: Compiled, target: str):
    def good(x: Launch) -> bool:
        return not x.figures.get("stack") and not x.figures.get("spills")

    _assert_all(target, compiled(target), good)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_and_registers_have_room_for_a_block(compiled: Compiled, target: str):
    limit = device.shared_memory(target)

    def good(x: Launch) -> bool:
        return x.figures.get("shared", 0) <= limit and x.figures.get("blocks", 1) >= 1

    _assert_all(target, compiled(target), good)


@pytest.mark.parametrize("target", TARGETS)
def test_addresses_are_known_to_be_aligned(compiled: Compiled, target: str):
    # Without known alignment, loads are 2 or 4 bytes wide.
    _assert_all(target, compiled(target), lambda x: not x.unaligned)


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_products_take_the_matrix_units(compiled: Compiled, target: str):
    unit, products = UNITS.get(target, "mma"), _products(compiled(target))
    _assert_all(target, products, lambda x: x.figures.get(unit, 0) > 0)
    if unit != "mma":
        _assert_all(target, products, lambda x: x.figures.get("mma", 0) == 0)


@pytest.mark.parametrize("target", NVIDIA)
def test_blocks_of_a_product_are_copied_while_others_are_multiplied(
    compiled: Compiled, target: str
):
    def good(x: Launch) -> bool:
        return x.figures.get("bulk_copies" if x.descriptors else "async_copies", 0) > 0

    products = _products(compiled(target))
    # RTX 50 has bulk copies, but its tiles take pointers.
    assert any(x.descriptors for x in products) == (target in ("sm_90", "sm_100"))
    _assert_all(target, products, good)


@pytest.mark.parametrize("target", NVIDIA)
def test_registers_move_between_warps_only_where_warps_are_specialised(
    compiled: Compiled, target: str
):
    def good(x: Launch) -> bool:
        specialised = x.descriptors > 0 and x.tile is not None and x.tile["variant"] == "tma_ws"
        return (x.figures.get("setmaxnreg", 0) > 0) == specialised

    _assert_all(target, compiled(target), good)


@pytest.mark.parametrize("target", ["sm_90"])
def test_two_programs_of_a_split_with_four_warps_share_a_multiprocessor(
    compiled: Compiled, target: str
):
    tiled = [x for x in compiled(target) if x.tile and x.descriptors]
    few = [
        x for x in tiled if x.tile and (x.tile["variant"], x.figures["warps"]) == ("tma_split", 4)
    ]
    assert few
    _assert_all(target, few, lambda x: x.figures["blocks"] >= 2)


def test_targets_are_those_that_launchers_know():
    assert set(PROCESSORS) == set(TARGETS)


@pytest.mark.parametrize(
    "words", ["sm_90 forward tma_split", "sm_80 dlogits pointer", "sm_100 forward tma"]
)
def test_instructions_are_those_of_the_file_of_costs(pytestconfig: pytest.Config, words: str):
    """Where it fails, `python -m benchmarks.gpu.costs` writes the file anew."""
    if costs.version() != (here := metadata.version("triton")):
        pytest.skip(f"the file counts code of Triton {costs.version()}; this is {here}")
    cache = pytestconfig.cache.mkdir("triton")
    done = _run(cache, "benchmarks.gpu.costs", "--check", *words.split())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
