"""The backward in blocks with a bound of its rows, as on a GPU, whose host does not count them."""

import pytest
import torch

from entropy_kernels._torch.head_backward import backward
from entropy_kernels._torch.head_forward import forward
from entropy_kernels.head import Head


@pytest.mark.parametrize("most", [7, 8, 20, 40])
@pytest.mark.parametrize("stored", [False, True])
def test_a_bound_of_the_active_rows_changes_nothing_but_that_nobody_counts_them(most, stored):
    """Places without a row take numbers of row 0, which holds what would spoil every sum."""
    h, w, y, b = torch.randn(20, 12), torch.randn(31, 12), torch.randint(31, (20,)), torch.randn(31)
    b[3] = -torch.inf
    h[0], y[0] = torch.nan, -100
    temperature = torch.rand(20) + 0.5
    temperature[0] = 0
    head = Head(h, w, y, b, temperature, 5.0)
    rows = forward(head, keep_logits=stored)
    for x in rows[:5]:
        x[0] = torch.nan
    gradients = tuple(torch.randn(20) * (torch.arange(20) % 3 == 1) for _ in range(3))
    exact = backward(gradients, head, rows, (True,) * 3)
    bounded = backward(gradients, head, rows, (True,) * 3, max_active_rows=most)
    for got, want in zip(bounded, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not bounded[0][gradients[0] == 0].any()
    for fewer in (0, 1, 6):
        main = torch.zeros_like(w)
        dhidden, _, dbias = backward(
            gradients, head, rows, (True,) * 3, max_active_rows=fewer, main_grad=main
        )
        assert all(x.isnan().all() for x in (dhidden, dbias, main))
