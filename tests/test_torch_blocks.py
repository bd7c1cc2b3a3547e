"""The fp32 product of the blocks: as exact as one accumulator, whichever library multiplies."""

import pytest
import torch

from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels._torch.blocks import ONEDNN_LEAST, product
from entropy_kernels.testing import Watch


@pytest.mark.parametrize("inner", [1, ONEDNN_LEAST - 1, ONEDNN_LEAST, ONEDNN_LEAST + 1, 1024])
@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
def test_product_is_as_exact_as_an_accumulator_whatever_the_strides(inner, transposed):
    left, right = torch.randn(37, inner), torch.randn(inner, 53)
    if transposed in ("left", "both"):
        left = left.T.contiguous().T
    if transposed in ("right", "both"):
        right = right.T.contiguous().T
    truth = left.double() @ right.double()
    with Watch() as watch:
        got = product(left, right)
    assert watch.products == 37 * inner * 53
    (plain,) = worst_of_orders(lambda: [torch.mm(left, right)], [truth])
    assert_within_two_bounds(got, truth, plain, plain)


def test_product_keeps_nan_and_infinity_in_their_row():
    left, right = torch.randn(8, 256), torch.randn(256, 8)
    left[2, 100], left[5, 7] = torch.nan, torch.inf
    got = product(left, right)
    assert got[2].isnan().all()
    assert not got[5].isfinite().any()
    assert got[[0, 1, 3, 4, 6, 7]].isfinite().all()
