"""What the tests of `token_ids` share: ids of both forms, and their truth.

T tokens, D hidden, V vocabulary, K ids asked for.
"""

import torch

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.testing import Watch, peaked_head
from tests.head_cases import arithmetic_of

T, D, V = 37, 40, 211
CALL_D, CALL_V = 16, 61  # of a call whose options are tried
FORMS = ["shared", "per token"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("logprob", "entropy", "logsumexp", "tokens")


def logprobs(head, ids, **options):
    """logprob, entropy, logsumexp and the ids' log-probabilities."""
    found = ek.linear_logprob_entropy(head, token_ids=ids, **options)
    return *found[:3], found.token_logprobs


def formula(head, ids):
    """The same by all logits."""
    return *reference.linear_logprob_entropy(head), reference.token_logprobs(head, ids)


def run(function, leaves, dtype, incoming, device="cpu"):
    """The outputs, and the gradients of hidden, weight and bias for `incoming`, None for none."""
    leaves = [None if x is None else x.detach().to(device, dtype) for x in leaves]
    trained = [x.requires_grad_() for x in leaves if x is not None]
    outputs = function(*leaves)
    pairs = [
        (x, g.to(device, x.dtype)) for x, g in zip(outputs, incoming, strict=True) if g is not None
    ]
    grads = torch.autograd.grad([x for x, _ in pairs], trained, [g for _, g in pairs])
    return [x.detach().cpu() for x in (*outputs, *grads)]


def check(leaves, y, ids, incoming, impl, device, arguments=None, **options):
    """Every output and gradient within both bounds; the leaves are of the dtype to be tested.

    leaves: hidden, weight and bias or None. arguments: the function's; options: the head's.
    """
    h, w, _ = leaves

    def head(h, w, b):
        given = {k: x.to(h.device) if torch.is_tensor(x) else x for k, x in options.items()}
        return ek.Head(h, w, y.to(h.device), b, **given)

    def ours(*leaves):
        return logprobs(head(*leaves), ids.to(device), impl=impl, **arguments or {})

    def exact(*leaves):
        return formula(head(*leaves), ids)

    got = run(ours, leaves, h.dtype, incoming, device)
    truth = run(exact, leaves, torch.float64, incoming)
    plain = worst_of_orders(lambda: run(exact, leaves, torch.float32, incoming), truth)
    eager = plain if h.dtype == torch.float32 else run(exact, leaves, h.dtype, incoming)
    of_gpu = None if device == "cpu" else arithmetic_of(h.to(device), w.to(device))
    for mine, wanted, other, same in zip(got, truth, eager, plain, strict=True):
        assert mine.shape == wanted.shape
        if mine.numel() == 0:
            continue
        assert mine.isfinite().all()
        more = 0.0 if of_gpu is None else of_gpu.gradient(wanted)
        assert_within_two_bounds(mine, wanted, other, same, operands=h.dtype, allowance=more)
    assert (got[3] <= 0).all()
    return got


def gradients(ids, tokens=T, seed=0):
    """Gradients of all outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = *(3 * [(tokens,)]), (tokens, ids.shape[-1])
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def per_token(ids, tokens=T):
    """Ids that all rows share, as ids per token."""
    return ids.expand(tokens, -1).clone()


def of_the_rows(h, w, y, seed=0):
    """Per token its likeliest id twice, its target, the second likeliest, and two at random."""
    generator = torch.Generator().manual_seed(seed)
    best = (h.float() @ w.float().T).topk(2).indices
    others = torch.randint(len(w), (len(y), 2), generator=generator)
    return torch.cat([best[:, :1], best, y.clamp_min(0)[:, None], others], 1)


def asked_for(form):
    """Hidden, weight, targets and ids of one form."""
    h, w, y = peaked_head(T, CALL_D, CALL_V)
    ids = torch.tensor([3, 8, 3, 11])
    return h, w, y, of_the_rows(h, w, y) if form == "per token" else ids


def on(device, *tensors):
    return [x.to(device) for x in tensors]


def backward_of(given, found, active):
    """The products of a backward at some rows of the ids' log-probs."""
    with Watch() as watch:
        (found.token_logprobs * active[:, None]).sum().backward()
    return watch.products
