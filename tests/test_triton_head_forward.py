"""The forward kernels of Triton: each variant against fp64; without a GPU in the interpreter.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch
import triton

from entropy_kernels import device
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels._triton.head_forward import launch, launch_variants
from entropy_kernels.head import Head
from tests.head_cases import arithmetic_of, assert_as_reference, make
from tests.marks import sampled
from tests.traffic import Traffic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ["pointer", "tma", "tma_split", "tma_ws", "cublas"]
SHAPE = (33, 40, 301)

# NumPy computes in the interpreter, and warns where a GPU is silent.
pytestmark = [sampled(0.2), pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


def forward(
    h, w, y, *, bias=None, temperature=None, softcap=None, ignore=-100, keep=False, **chosen
):
    """The launcher; skips what cannot run here."""
    usable = tiles.variants(device.architecture(h.device), h, w)
    if chosen.get("variant", "pointer") not in usable:
        pytest.skip("this variant cannot run on these matrices here")
    head = Head(h, w, y, bias, temperature, softcap, ignore)
    return launch.forward(head, keep_logits=keep, **chosen)


def check(h, w, y, *, bias=None, temperature=None, softcap=None, ignore=-100, **chosen):
    """Both bounds for logprob, entropy and logsumexp; the parts of logsumexp add up to it."""
    got = forward(
        h, w, y, bias=bias, temperature=temperature, softcap=softcap, ignore=ignore, **chosen
    )
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore}
    assert_as_reference([*got[:3]], (h, w, y, bias), **options)
    assert all(x.dtype == torch.float32 for x in got[:3])
    top = got.max if temperature is None else got.max / temperature
    parts = torch.where(y != ignore, top + got.log_sum, 0)
    torch.testing.assert_close(parts, got.logsumexp)
    assert (got.logprob <= 0).all()
    assert (got.log_sum >= 0).all()
    return got


def head(rows="peaked", shape=SHAPE, dtype=torch.float32):
    return make(rows, shape, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(variant, dtype):
    check(*head(dtype=dtype), variant=variant)


@pytest.mark.parametrize("variant", ["pointer", "cublas", None])
def test_stored_logits_are_the_product_without_bias(variant):
    h, w, y = head(dtype=torch.bfloat16)
    bias = torch.randn(w.shape[0], device=DEVICE).bfloat16()
    got = forward(h, w, y, bias=bias, softcap=5.0, keep=True, variant=variant or "pointer")
    truth = h.double() @ w.double().T
    (plain,) = worst_of_orders(lambda: [h.float() @ w.float().T], [truth])
    arithmetic = arithmetic_of(h, w)
    allowance = 0.0 if arithmetic is None else arithmetic.logit
    assert_within_two_bounds(got.logits, truth, plain, plain, allowance=allowance)


@pytest.mark.parametrize("keep", [False, True], ids=["workspace", "kept"])
def test_torch_touches_the_logits_once_to_multiply(keep):
    """A bias is added by the kernel that reads them."""
    h, w, y = head()
    with Traffic(h.shape[0] * w.shape[0]) as traffic:
        forward(h, w, y, bias=torch.randn(w.shape[0], device=DEVICE), keep=keep, variant="cublas")
    # The interpreter copies.
    assert {*traffic.names} - {"set_", "copy_", "_to_copy"} == {"mm"}


def test_stored_logits_need_a_variant_that_has_them():
    with pytest.raises(ValueError, match="variant must be one of"):
        forward(*head(), keep=True, variant="tma")


def test_ties_of_the_maximum_are_counted_across_tiles_and_splits(variant):
    """Every logit is 1: the entropy is log V nats, from V ties in three splits."""
    T, D, V = SHAPE
    ones = torch.ones(T, D, device=DEVICE)
    w = torch.zeros(V, D, device=DEVICE)
    w[:, 0] = 1
    got = forward(ones, w, torch.zeros(T, dtype=torch.int64, device=DEVICE), variant=variant)
    log_v = torch.tensor(float(V)).log().item()
    assert (got.entropy - log_v).abs().max() < 1e-6
    assert (got.logprob + log_v).abs().max() < 1e-6


@pytest.mark.parametrize("gap", [3.0, 14.0, 27.0])
def test_entropies_keep_their_digits(variant, gap):
    """Two words g nats apart, in different splits: H = log1p(s) + g s / (1 + s), s = exp(-g)."""
    V = SHAPE[2]
    w = torch.full((V, 8), -200.0, device=DEVICE)
    w[5], w[V - 1] = 0.0, -gap
    h = torch.zeros(4, 8, device=DEVICE)
    h[:, 0] = 1
    y = torch.tensor([5, V - 1, 5, 5], device=DEVICE)
    got = forward(h, w, y, variant=variant)
    s = torch.tensor(-gap, dtype=torch.float64, device=DEVICE).exp()
    entropy = s.log1p() + gap * s / (1 + s)
    assert ((got.entropy - entropy).abs() / entropy).max() < 1e-5
    assert ((got.logprob[0] + s.log1p()).abs() / s.log1p()) < 1e-5


@pytest.mark.parametrize("column", [0, 100, 300])
def test_a_nan_anywhere_in_the_weight_reaches_all_rows(variant, column):
    h, w, y = head()
    w[column, 0] = torch.nan
    assert all(x.isnan().all() for x in forward(h, w, y, variant=variant)[:5])


def test_a_target_that_is_masked_has_no_probability(variant):
    h, w, y = head()
    bias = torch.zeros(w.shape[0], device=DEVICE)
    bias[y[0]] = -torch.inf
    got = forward(h, w, y, bias=bias, variant=variant)
    assert got.logprob[0] == -torch.inf
    assert got.entropy.isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_any_strides(which, layout):
    """Where descriptors do not fit, the table's next choice is taken."""
    h, w, y = head()
    x = h if which == "hidden" else w
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0]
    elif layout == "offset":
        x = torch.cat([torch.full_like(x[:, :1], torch.nan), x], dim=1)[:, 1:]
    else:
        x = x[:1].expand(x.shape)
    assert tiles.variants("sm_90", x) == {"pointer", "cublas"}
    check(*((x, w) if which == "hidden" else (h, x)), y)


def test_strided_targets_bias_and_temperatures(variant):
    h, w, y = head()
    y = torch.stack([y, y.new_full(y.shape, -100)], dim=1)[:, 0]
    bias = torch.randn(w.shape[0], 2, device=DEVICE)[:, 0]
    temperature = torch.rand(y.shape[0], 2, device=DEVICE)[:, 0] + 0.5
    check(h, w, y, bias=bias, temperature=temperature, variant=variant)


@pytest.mark.parametrize("split", [64, 192, 1 << 20])
@pytest.mark.parametrize("name", ["pointer", "tma", "cublas"])
def test_splits_of_any_size(name, split):
    tile = Tile(name, 32, 64, 32, 4, 1, group_t=2, split_v=split)
    if name not in tiles.variants(device.architecture(torch.device(DEVICE)), *head()[:2]):
        pytest.skip("this variant cannot run here")
    check(*head(), tile=tile)


@pytest.mark.parametrize("keep", [False, True])
def test_a_small_workspace_takes_rows_in_chunks(monkeypatch, keep):
    monkeypatch.setattr(launch_variants, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(launch_variants, "WORKSPACE_BLOCK", 16)
    check(*head(), variant="cublas", keep=keep)


def test_no_tokens():
    h, w, y = head()
    got = forward(h[:0], w, y[:0], keep=True)
    assert [tuple(x.shape) for x in got[:6]] == [(0,)] * 5 + [(0, w.shape[0])]


@pytest.mark.parametrize("processors", [1, 3, 132])
@pytest.mark.parametrize("count", [1, 100, 8192])
@pytest.mark.parametrize("vocabulary", [1, 256, 257, 50257, 151936])
def test_splits_cover_the_vocabulary_and_none_is_empty(processors, count, vocabulary):
    tile = Tile("tma", 128, 256, 64, 8, 3)
    assert launch.splits(tile._replace(variant="tma_ws"), count, vocabulary, processors)[1] == 1
    n_split, per_split = launch.splits(tile, count, vocabulary, processors)
    assert 1 <= per_split * tile.block_v <= max(tile.split_v, tile.block_v)
    assert (n_split - 1) * per_split * tile.block_v < vocabulary
    assert vocabulary <= n_split * per_split * tile.block_v


@pytest.mark.parametrize("processors", [84, 108, 128, 132, 148, 170, 304])
@pytest.mark.parametrize("vocabulary", [32000, 151936, 262144])
@pytest.mark.parametrize("block_v", [64, 128, 256])
def test_splits_are_nearly_best_and_of_few_sizes(processors, vocabulary, block_v):
    tile, sizes = Tile("tma", 128, block_v, 64, 8, 3), set()
    for count in range(2000, 40001, 250):
        blocks = triton.cdiv(count, tile.block_t)
        _, per_split = launch.splits(tile, count, vocabulary, processors)
        steps = {
            size: triton.cdiv(blocks * triton.cdiv(vocabulary, size * block_v), processors) * size
            for size in range(1, tile.split_v // block_v + 1)
        }
        assert steps[per_split] <= 1.01 * min(steps.values())
        sizes.add(per_split)
    assert len(sizes) <= 5, "each is compiled"


def test_programs_beside_a_collective_take_a_unit_each(monkeypatch):
    where = torch.device(DEVICE)
    processors = device.processors(where)
    assert [device.programs(n, where) for n in (1, 1000)] == [1, processors]
    monkeypatch.setenv("EK_PERSISTENT", "off")
    assert [device.programs(n, where) for n in (1, 1000)] == [1, 1000]
    check(*head(), variant="tma")
    monkeypatch.setenv("EK_PERSISTENT", "maybe")
    with pytest.raises(ValueError, match="EK_PERSISTENT must be on or off; got 'maybe'"):
        device.programs(1, where)


def test_splits_are_not_read_again_for_a_thousandth_of_the_time():
    tile = Tile("tma_split", 128, 128, 64, 8, 3)
    assert launch.splits(tile, 32768, 151936, 132) == (149, 8)


@pytest.mark.parametrize(
    "op",
    [
        *("forward", "forward_softcap", "forward_statistics", "forward_statistics_softcap"),
        *("forward_store", "dlogits", "dlogits_softcap"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_architecture_has_a_tile(op, arch, dtype):
    matrix = torch.empty(8, 64, dtype=dtype, device="meta")
    for usable in (tiles.variants(arch, matrix), {"pointer"}):
        for tile in tiles.row(op, arch, dtype, 4096, 8192, usable):
            assert tile.variant in usable
            if tile.variant in tiles.TMA:
                assert arch in ("sm_90", "sm_100")


def test_the_smallest_shape_that_holds_this_one_is_taken(monkeypatch):
    small, large = Tile("pointer", 1, 1, 1, 1, 1), Tile("pointer", 2, 2, 2, 2, 2)
    table = {
        tiles.Key("forward", "sm_90", "bfloat16", tiles.ANY, tiles.ANY): (large,),
        tiles.Key("forward", "sm_90", "bfloat16", 1024, 8192): (small,),
    }
    monkeypatch.setattr(tiles, "TILES", table)
    found = [
        tiles.row("forward", "sm_90", torch.float16, hidden, tokens, {"pointer"})
        for hidden, tokens in [(1024, 8192), (1025, 8192), (1024, 8193)]
    ]
    assert found == [(small,), (large,), (large,)]
    with pytest.raises(ValueError, match="no tile of 'forward'"):
        tiles.row("forward", "sm_90", torch.bfloat16, 1, 1, {"tma"})


def test_warp_specialisation_is_for_hopper_and_one_version(monkeypatch):
    matrix = torch.empty(8, 64, device="meta")
    for version, expected in [((3, 6), True), ((3, 9), False)]:
        monkeypatch.setattr(device, "triton_version", lambda version=version: version)
        assert ("tma_ws" in tiles.variants("sm_90", matrix)) == expected
        assert "tma_ws" not in tiles.variants("sm_100", matrix)
