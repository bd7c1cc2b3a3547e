"""The machine code of the built CUDA kernels: instructions, registers, and nothing in memory."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import costs
from entropy_kernels._extensions import load
from entropy_kernels._triton.common import cutlass
from tests.cuda import host, machine_code
from tests.cuda.machine_code import WANTED, Kernel

# As nvdisasm prints what WANTED has.
LINES = {
    "sm_80": ("HMMA.16816.F32.BF16 R60, R84, R104, R60", "LDGSTS.E.BYPASS.LTC128B.128 [R5], [R6]"),
    "sm_90a": (
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR28], R24, gsb0",
        "@P0 UTMALDG.3D.MULTICAST [UR8], [UR4], UR10, desc[UR6]",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
    ),
    "sm_100a": (
        "UTCHMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0",
        "UTMALDG.3D.2CTA [UR8], [UR4], desc[UR6]",
        "LDTM.x64 R4, tmem[UR5]",
    ),
}


@pytest.fixture(scope="module")
def kernels():
    path, why = machine_code.module()
    if path is None:
        host.skip(why)
    return list(machine_code.kernels(path))


def test_kernels_spill_nothing_and_have_their_instructions(kernels):
    assert [fault for kernel in kernels for fault in kernel.faults] == []


def test_every_tile_of_the_table_is_built_with_as_many_stages(kernels):
    heads = [kernel for kernel in kernels if kernel.tile is not None]
    built = {kernel.architecture.removesuffix("a") for kernel in heads}
    wanted = {
        (key.architecture, key.op, statistics, (x.block_t, x.block_v, x.block_d, x.num_stages))
        for key, row in cutlass.TILES.items()
        for x in row
        for statistics in (False, True)[: 1 + (key.op == "forward")]
        if key.architecture in built
    }
    assert wanted
    found = [(x.architecture.removesuffix("a"), x.name, x.statistics, x.tile) for x in heads]
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_predictions_count_the_kernels_that_are_built(kernels):
    """nvcc 13.0 made those of costs.json; another compiler counts otherwise."""
    compiler = load("cuda")[0].compiler
    if not compiler.startswith("nvcc 13.0"):
        pytest.skip(f"costs.json has the instructions of nvcc 13.0; got {compiler}")
    known = costs.read()
    found = costs.of_cuda([])
    assert found
    for architecture, counted in found.items():
        assert sorted(counted) == [x for x in known[architecture] if x.variant == "cutlass"]


def test_plain_kernels_are_the_same_on_every_architecture(kernels):
    plain = [(x.name, x.architecture) for x in kernels if x.tile is None]
    names, architectures = ({words[i] for words in plain} for i in (0, 1))
    assert len(names) > 5
    assert set(plain) == {(name, arch) for name in names for arch in architectures}


def _head(architecture: str, *lines: str, stack: int = 0, local: int = 0) -> Kernel:
    code = "".join(f"        /*{16 * i:04x}*/   {x} ;\n" for i, x in enumerate(lines))
    tile = (128, 128, 64, 3)
    return Kernel("forward", "", architecture, False, tile, 168, 1024, stack, local, code)


@pytest.mark.parametrize("architecture", WANTED)
def test_each_instruction_that_is_missing_is_a_fault(architecture):
    lines = LINES[architecture]
    assert _head(architecture, *lines).faults == []
    for missing in lines:
        kernel = _head(architecture, *(line for line in lines if line != missing))
        assert kernel.faults, missing


@pytest.mark.parametrize(
    ("architecture", "whole", "part", "fault"),
    [
        pytest.param("sm_90a", "UTMALDG.3D.MULTICAST", "UTMALDG.3D", "MULTICAST", id="alone"),
        pytest.param("sm_100a", "UTCHMMA.2CTA", "UTCHMMA", "UTCHMMA", id="one processor"),
        pytest.param("sm_100a", "UTMALDG.3D.2CTA", "UTMALDG.3D", "UTMALDG", id="its operands"),
    ],
)
def test_an_instruction_for_one_block_is_not_that_of_a_cluster(architecture, whole, part, fault):
    lines = [line.replace(whole, part) for line in LINES[architecture]]
    (found,) = _head(architecture, *lines).faults
    assert fault in found


def test_registers_in_memory_are_faults():
    lines = LINES["sm_80"]
    for line in ("LDL.64 R2, [R1+0x8]", "@!P0 STL [R1], R4"):
        assert len(_head("sm_80", *lines, line).faults) == 1
    assert len(_head("sm_80", *lines, stack=8).faults) == 1
    assert len(_head("sm_80", *lines, local=8).faults) == 1
