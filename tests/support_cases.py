"""What the tests of `support` share: random sets, heads over them, and their truth.

T tokens, D hidden, V vocabulary, N pairs of a token and an id of its set.
"""

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels._rows import OF_SETS
from entropy_kernels.verification.truth import LOW_ENTROPY, TRUTH_ERROR, check_is_top1
from tests.head_cases import arithmetic_of, make, numbers

OUTPUTS = ("logprob", "entropy")


def random_sets(target_T: Tensor, vocabulary: int, seed: int = 0) -> Tensor:
    """Which ids each set keeps, bool [T, V]: about a third of one, then of few, of many and all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(target_T)
    share_T = torch.tensor([0.0, 0.0, 3 / vocabulary, 8 / vocabulary, 0.5, 1.0])[
        torch.randint(6, (tokens,), generator=generator)
    ]
    kept_TV = torch.rand(tokens, vocabulary, generator=generator) < share_T[:, None]
    kept_TV[torch.arange(tokens), target_T.cpu()] = True
    return kept_TV.to(target_T.device)


def unsorted(kept_TV: Tensor, seed: int = 0) -> ek.Support:
    """The sets, each in a random order."""
    kept_TV, device = kept_TV.cpu(), kept_TV.device
    row_N, id_N = kept_TV.nonzero(as_tuple=True)
    generator = torch.Generator().manual_seed(seed)
    order_N = (row_N + torch.rand(len(row_N), generator=generator, dtype=torch.float64)).argsort()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept_TV.sum(1).cumsum(0)])
    return ek.Support(id_N[order_N].to(device), offsets.to(device))


def make_sets(rows, shape, dtype, device="cpu"):
    """A head of one kind, as `make`, and which ids each set keeps."""
    h, w, y = make(rows, shape, dtype, device)
    return (h, w, y), random_sets(y, shape[2])


def masked(dtype, h, w, y, kept_TV, bias=None, ignore_index=-100, **options):
    """Log-prob, entropy and statistics through logits that are -inf outside of the sets."""
    bias = None if bias is None else bias.to(dtype)
    z_TV = reference._logits(ek.Head(h.to(dtype), w.to(dtype), y, bias, **options), None)
    valid_T = y != ignore_index
    inside_TV = kept_TV | ~valid_T[:, None]
    logp_TV = z_TV.where(inside_TV, -torch.inf).log_softmax(1)
    # Where p is 0 every term is, whatever its log.
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV.clamp_min(-1e4)).sum(1)
    finite_TV = logp_TV.where(p_TV > 0, 0.0)
    logprob_T = logp_TV.gather(1, y.long().where(valid_T, 0)[:, None])[:, 0]
    square_TV = p_TV.square()
    varentropy_T = (p_TV * (finite_TV + entropy_T[:, None]).square()).sum(1)
    more = varentropy_T, p_TV.amax(1), square_TV.sum(1), (square_TV * finite_TV).sum(1)
    return [torch.where(valid_T, x, 0.0) for x in (logprob_T, entropy_T, *more)]


def run(function, inputs, grads):
    """Outputs, statistics and gradients (hidden, weight, bias) of `function(h, w, y, bias)`."""
    h, w, y, b = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (h, w, b)]
    found = function(leaves[0], leaves[1], y, leaves[2])
    pairs = [(x, g.to(x.dtype)) for x, g in zip(found, grads, strict=False) if g is not None]
    torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    return [x.detach() for x in found], [x.grad for x in leaves if x is not None]


def check(head, inputs, kept_TV, *, keep=0.6, orders=8, support=None, **options):
    """Both bounds for the outputs, the statistics and every gradient; the outputs' and gradients.

    `keep`: the share of rows with a gradient.
    """
    h, w, y, b = inputs
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(len(y), generator=generator) for _ in OUTPUTS]
    some_T = torch.rand(len(y), generator=generator) < keep
    grads = [(x * some_T).to(h.device) for x in draw]
    support = unsorted(kept_TV) if support is None else support

    def ours(h, w, y, bias):
        found = head(h, w, y, bias=bias, support=support, statistics=OF_SETS, **options)
        assert found.logsumexp is None
        with torch.no_grad():
            check_is_top1(found.is_top1, h, w, y, bias=bias, support=support, **options)
        return numbers(found)

    def typed(dtype):
        upcast = [None if x is None else x.to(dtype) for x in (h, w, b)]
        both = run(
            lambda h, w, y, bias: masked(dtype, h, w, y, kept_TV, bias, **options),
            (*upcast[:2], y, upcast[2]),
            grads,
        )
        return both[0] + both[1]

    truth = typed(torch.float64)
    plain = worst_of_orders(lambda: typed(torch.float32), truth, orders)
    eager = plain if h.dtype == torch.float32 else typed(h.dtype)
    outputs, gradients = run(ours, inputs, grads)
    got = outputs + gradients
    more = allowances(truth, h, w, **options)
    for number, quintet in enumerate(zip(got, truth, eager, plain, more, strict=True)):
        *quartet, allowance = quintet
        assert_within_two_bounds(*quartet, allowance=allowance)
        low = truth[1] < LOW_ENTROPY
        if number == 1 and low.any():
            # What high entropies err hides what low ones do.
            quartet, allowance = [x[low] for x in quartet], torch.as_tensor(allowance)
            allowance = allowance[low] if allowance.ndim else allowance
            assert_within_two_bounds(*quartet, allowance=allowance + TRUTH_ERROR)
    return outputs, gradients


def allowances(truth, h, w, **options):
    """What a GPU's arithmetic may add to each result; nothing on a CPU."""
    arithmetic = arithmetic_of(h, w, **options)
    if arithmetic is None:
        return [0.0] * len(truth)
    logprob, entropy, *statistics = truth[:6]
    outputs = arithmetic.outputs(logprob, entropy, logprob)[:2]
    of_sets = arithmetic.statistics(*statistics, torch.zeros_like(entropy))[:4]
    found = [*outputs, *of_sets, *map(arithmetic.gradient, truth[6:])]
    assert len(found) == len(truth)
    return found
