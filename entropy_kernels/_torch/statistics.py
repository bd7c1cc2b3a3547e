"""The sums behind varentropy, largest probability, the sums of p^2 and p^2 log p, mean logit, and
whether the target is the first of the largest logits.

Beside s and t of head_forward.py, relative to the same maximum m and with the same one
maximum left out,

    u = sum_j d_j^2 exp(d_j),   s2 = sum_j exp(2 d_j),   t2 = sum_j d_j exp(2 d_j)

and with Z = 1 + s, L = log1p(s)

    varentropy  = (u + (u s - t^2)) / Z^2
    max_prob    = 1 / Z
    sum_p2      = (1 + s2) / Z^2
    sum_p2_logp = (t2 - L (1 + s2)) / Z^2

u s - t^2 is not negative (Cauchy and Schwarz), and it is what the columns beside the maximum
differ among themselves; u is how far they all lie from it. So nothing cancels where the entropy is
small, down to 1e-12. Where it is large, u s - t^2 loses the digits of E[d^2] / varentropy: about
20 for logits that are normally distributed.

T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Its square is the smallest normal number in fp32; slower ones add nothing to a sum that holds 1.
_SMALLEST = 2.0**-63


def block_sums(e_TV: Tensor, d_TV: Tensor) -> list[Tensor]:
    """(u, s2, t2) of one block from exp(d), the maximum's set to 0, and d; one block allocated."""
    block_TV = e_TV.clamp_min(_SMALLEST).square_()
    s2_T = block_TV.sum(1)
    t2_T = block_TV.mul_(d_TV).sum(1)
    u_T = torch.mul(d_TV, d_TV, out=block_TV).mul_(e_TV).sum(1)
    return [x.double() for x in (u_T, s2_T, t2_T)]


def merge_sums(
    left: Sequence[Tensor], right: Sequence[Tensor], left_shift_T: Tensor, right_shift_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s2, t2) of two sets of columns, (s, t, u, s2, t2) each, moved by their shifts to one max.

    u <- a (u + shift (2 t + (1 + s) shift)),  t2 <- a^2 (t2 + (1 + s2) shift),  a = exp(shift);
    the moved maximum's 1 enters s2, the other one's does not.
    """
    moved_u, moved_t2 = torch.zeros_like(left[2]), torch.zeros_like(left[4])
    moved_sum = []
    for (s_T, t_T, u_T, s2_T, t2_T), shift_T in ((left, left_shift_T), (right, right_shift_T)):
        a_T = shift_T.exp()
        moved_u += a_T * (u_T + shift_T * (2 * t_T + (1 + s_T) * shift_T))
        moved_t2 += a_T.square() * (t2_T + (1 + s2_T) * shift_T)
        moved_sum.append(a_T.square() * (1 + s2_T))
    stays_T = left_shift_T >= right_shift_T
    s2_T = torch.where(stays_T, left[3] + moved_sum[1], right[3] + moved_sum[0])
    return moved_u, s2_T, moved_t2


def finish_statistics(sums: Tensor, mean_logit_T: Tensor, is_top1_T: Tensor) -> Tensor:
    """fp32 [6, T], in the order of _rows.STATISTICS, from (s, t, u, s2, t2) [5, T] and the last."""
    s_T, t_T, u_T, s2_T, t2_T = sums
    z_T = 1 + s_T
    rows_T = [
        (u_T + (u_T * s_T - t_T.square()).clamp_min(0)) / z_T.square(),
        1 / z_T,
        (1 + s2_T) / z_T.square(),
        (t2_T - s_T.log1p() * (1 + s2_T)) / z_T.square(),
        mean_logit_T,
        is_top1_T,
    ]
    return torch.stack([x.float() for x in rows_T])
