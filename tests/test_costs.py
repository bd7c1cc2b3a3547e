"""Instructions are counted where they are executed, and predictions by what is launched."""

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_page
from benchmarks.gpu import assembly, costs, model, predictions
from benchmarks.gpu.assembly import Counts
from benchmarks.gpu.hardware import GPUS, gpu
from benchmarks.gpu.launches import Shape, forward_of, step_of
from benchmarks.predicted_tables import LABELS

H200 = GPUS[0]


def _listing(text: str) -> str:
    """As nvdisasm prints it: labels, and an address before each instruction. AMD's as it is."""
    if "s_endpgm" in text:
        return text
    lines = []
    for place, line in enumerate(text.split("\n")):
        label = line.endswith(":")
        lines.append(line if label else f"        /*{16 * place:04x}*/                   {line} ;")
    return "\n".join(lines)


NESTED = """\
LDC R1, c[0x0][0x28]
.L_x_3:
IMAD R2, R2, R3, R4
@P0 BRA `(.L_x_0)
.L_x_1:
LDGSTS.E [R5], [R6]
HMMA.16816.F32.BF16 R60, R84, R104, R60
HMMA.16816.F32.BF16 R64, R84, R106, R64
@!P1 BRA `(.L_x_1)
.L_x_0:
FADD R2, R60, R3
MUFU.EX2 R2, R2
@P0 BRA `(.L_x_3)
STG.E [R8], R2
EXIT
.L_x_4:
BRA `(.L_x_4)
NOP"""
FLATTENED = """\
.L_x_4:
IMAD R2, R2, R3, R4
.L_x_5:
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR28], R24, gsb0
BRA.U UP0, `(.L_x_3)
FADD R2, R60, R3
MUFU.EX2 R2, R2
STG.E [R8], R2
.L_x_3:
@P0 BRA `(.L_x_4)
EXIT
.L_x_2:
SYNCS R1
@!P0 BRA `(.L_x_2)
BRA `(.L_x_5)"""
ONE_TILE = """\
S2R R0, SR_TID.X
.L_x_1:
FFMA R2, R3, R4, R2
FFMA R5, R6, R7, R5
FFMA R8, R6, R7, R8
LDS R3, [R9]
@!P0 BRA `(.L_x_1)
FFMA R2, R3, R4, R2
MUFU.EX2 R2, R2
EXIT"""


OF_AMD = """\
\ts_branch .LBB0_2
.LBB0_2:                                ; =>This Loop Header: Depth=1
\tv_mul_lo_u32 v1, v2, v3
.LBB0_5:                                ;   Parent Loop
\tds_read_b128 v[4:7], v8
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[4:5], v[6:7], v[0:15]
\ts_add_i32 s1, s1, 32
\ts_cbranch_scc1 .LBB0_5
; %bb.6:
\tv_exp_f32_e32 v9, v0
\tv_add_f32_e32 v9, v9, v10
\ts_cbranch_vccnz .LBB0_2
\tglobal_store_dword v[2:3], v9, off
\ts_endpgm"""


@pytest.mark.parametrize(
    ("text", "step", "tile"),
    [
        pytest.param(OF_AMD, (1, 0, 1), (0, 1, 2), id="AMD's, without its scalar unit"),
        pytest.param(NESTED, (2, 0, 2), (0, 1, 4), id="the sums follow the loop over depth"),
        pytest.param(FLATTENED, (1, 0, 3), (0, 1, 2), id="one loop, the sums behind a branch"),
        pytest.param(ONE_TILE, (3, 0, 2), (0, 1, 3), id="no loop over tiles, fp32 products"),
    ],
)
def test_instructions_are_counted_per_step_and_per_tile(text, step, tile):
    found = assembly.count(_listing(text))
    assert found.step == Counts(*step)
    assert found.tile == Counts(*tile)


# Warps that multiply, and warps that sum a tile in two parts, each asked for a bias and a softcap.
SPECIALISED = """\
.L_x_1:
UTCHMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0
BRA.U UP0, `(.L_x_1)
EXIT
.L_x_2:
LDC R1, c[0x0][0x28]
.L_x_3:
LDTM.x64 R4, tmem[UR5]
BRA.U !UP1, `(.L_x_4)
LDG.E.U16 R2, [R6]
FADD R4, R4, R2
.L_x_4:
@P1 BRA `(.L_x_5)
MUFU.EX2 R3, R4
MUFU.RCP R3, R3
.L_x_5:
FADD R2, R60, R3
MUFU.EX2 R2, R2
MUFU.EX2 R3, R3
@P0 BRA `(.L_x_3)
STG.E [R8], R2
@P2 BRA `(.L_x_2)
EXIT"""


def test_options_that_are_not_given_are_not_counted():
    found = assembly.count_without_options(_listing(SPECIALISED), exponentials=4)
    assert found.step == Counts(1, 0, 1)
    # Twice a part of 7 instructions, and 3 more.
    assert found.tile == Counts(0, 4, 13)


def test_kernel_without_products_is_counted_in_the_loop_of_its_exponentials():
    text = NESTED.replace("HMMA.16816.F32.BF16", "FADD")
    assert assembly.count_of_values(_listing(text)) == Counts(0, 1, 8)


def test_each_logit_has_one_exponential_and_its_epilogue_is_counted_once():
    for found in costs.read().values():
        plain = [x for x in found if x.dtype == "bf16" and "softcap" not in x.flags]
        assert plain
        for cost in plain:
            # Sums that move to a larger maximum take a few per row besides.
            assert 1.0 <= cost.per_element[1] < 1.3, cost
            assert cost.step.product > 0


def test_a_product_that_covers_the_epilogue_hides_it_only_where_two_can_run():
    alone, paired = (_forward(hidden) for hidden in (4096, 1024))
    assert model.blocks(alone) == 1
    assert not model.overlaps(alone)
    assert model.overlaps(paired)
    for cost, hidden in ((alone, 4096), (paired, 1024)):
        found = model.clocks(cost, hidden, H200)
        serial = max(found.product / H200.sustained, found.feed) + found.epilogue
        assert (model.tile_clocks(cost, hidden, H200) < serial) == model.overlaps(cost)


def _forward(hidden: int) -> costs.Cost:
    launches = forward_of(Shape("sm_90", 132, 8192, hidden, 151936, 1639))
    return next(model.cost_of(x, H200) for x in launches if x.constants is not None)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("where", GPUS, ids=lambda x: x.name)
def test_a_step_launches_the_products_that_it_is_said_to(where, impl):
    """In units of T x D x V; the host knows neither more active rows nor more stored ones."""
    shape = Shape(where.architecture, where.processors, 8192, 4096, 151936, 1639)
    rho, stored = 1639 / 8192, min(1639, (1 << 30) // (4 * 151936)) / 8192
    wanted = {"0.2": 1 + 3 * rho, "threshold": 1 + 3 * rho - stored, "known": 3 * rho}
    for way, units in wanted.items():
        products = [x.product for x in step_of(shape, way, impl) if x.product is not None]
        got = sum(a * b * d for a, b, d in products) / (8192 * 4096 * 151936)
        assert got == pytest.approx(units, rel=1e-6), way


@pytest.mark.parametrize("name", [*LABELS, "triton-recomputed", "triton-forward"])
def test_predictions_grow_with_the_tokens_and_say_nothing_of_unknown_gpus(name):
    few, many = (predictions.milliseconds(name, tokens, 4096) for tokens in (8192, 32768))
    # All logits of the rows known beforehand fit at the smaller number alone.
    most = {"triton-known": 5, "triton-threshold": 4.5}.get(name, 4.2)
    assert 3.8 * few < many < most * few
    assert predictions.milliseconds(name, 8192, 4096, gpu("NVIDIA T4")) is None
    on_others = [predictions.milliseconds(name, 8192, 4096, where) for where in GPUS[1:]]
    by_rates = name.startswith(("flsce", "verl", "cce"))
    assert all((found is None) == by_rates for found in on_others)


@pytest.mark.parametrize("where", GPUS, ids=lambda x: x.name)
def test_csrc_is_predicted_by_its_own_kernels_where_it_has_them(where):
    shape = Shape(where.architecture, where.processors, 8192, 2048, 151936, 1639)
    names = {x.kernel for x in step_of(shape, "0.2", "cuda")}
    found = {op: f"{op}_cutlass_kernel" in names for op in ("forward", "dlogits")}
    assert found == {
        "forward": where.architecture.startswith(("sm_8", "sm_90", "sm_100")),
        "dlogits": where.architecture.startswith(("sm_8", "sm_90")),
    }
    # The targets' logits come from the tiles.
    assert found["forward"] == ("target_logit_kernel" not in names)
    counted = {x.op for x in model.of_cuda(where)}
    assert counted <= {op for op, is_own in found.items() if is_own}
    for name in ("cuda-0.2", "cuda-forward"):
        assert (predictions.milliseconds(name, 8192, 2048, where) is None) == (not counted), name


def test_page_of_gpus_is_current():
    """`python -m benchmarks.gpu_page` writes it."""
    assert gpu_page.render() == gpu_page.PATH.read_text()
