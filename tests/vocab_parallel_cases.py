"""Heads with their weight's rows on two or three ranks, and what each rank finds: run by processes.

T tokens, D hidden, V vocabulary.
"""

import functools
import itertools
import os

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from entropy_kernels import _native, _rows, backends, testing
from entropy_kernels.testing import Watch, peaked_head
from entropy_kernels.verification.truth import run
from tests.head_cases import logprob_entropy, make
from tests.loss_cases import policy_loss
from tests.processes import meeting, save_by_groups

T, D, V = 67, 40, 211
SHARES = {
    "uneven": {2: [130, 81], 3: [20, 141, 50]},
    "one row": {2: [210, 1], 3: [1, 209, 1]},
    "no row": {2: [0, 211], 3: [100, 0, 111]},
}
MISSING = {
    "cpu": _native.why_missing("cpu"),
    # Elsewhere than on a GPU only its interpreter computes.
    "triton": backends.why_not("triton", torch.device("cpu")),
}
ALL = ("bias", "temperature", "softcap", "ignore_index")
# Rows, dtype, options and shares.
# The statistics that ranks merge.
MERGED = _rows.filled("vocab_group")
CASES = {
    "peaked": ("peaked", torch.float32, (), "uneven"),
    "uniform": ("uniform", torch.float32, (), "uneven"),
    "tied": ("tied", torch.float32, (), "uneven"),
    "very negative": ("very negative", torch.float32, (), "uneven"),
    "large": ("large", torch.float32, (), "uneven"),
    "one row": ("peaked", torch.float32, ("bias",), "one row"),
    "no row": ("peaked", torch.float32, ("bias",), "no row"),
    "no row, no bias": ("peaked", torch.float32, ("softcap",), "no row"),
    "temperature": ("peaked", torch.float32, ("temperature",), "uneven"),
    "softcap": ("peaked", torch.float32, ("softcap",), "uneven"),
    "ignored": ("peaked", torch.float32, ("ignore_index",), "uneven"),
    "nothing but ignored": ("peaked", torch.float32, ("ignore all",), "uneven"),
    "bf16": ("peaked", torch.bfloat16, (), "uneven"),
    "fp16": ("peaked", torch.float16, ("bias",), "one row"),
    "all options": ("peaked", torch.float32, ALL, "uneven"),
    "all options, bf16": ("peaked", torch.bfloat16, ALL, "no row"),
    "kept logits": ("peaked", torch.bfloat16, ("bias", "keep_logits"), "uneven"),
    "bounded": ("peaked", torch.float32, ("max_active_rows",), "uneven"),
}
# The interpreter takes its time.
OF_TRITON = ["peaked", "no row", "bf16", "all options", "bounded"]


# Two words so many nats apart; the better one on the other's rank, or on the next.
GAPS = [0.5, 5.0, 15.0, 30.0]
BEST = [1, 3]


def case(name):
    """Hidden, weight, target and bias of all ranks, the head's options, and incoming gradients."""
    rows, dtype, names, _ = CASES[name]
    h, w, y = make(rows, (T, D, V), dtype)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(V, generator=generator).to(dtype) if "bias" in names else None
    options = {}
    if "temperature" in names:
        options["temperature"] = torch.rand(T, generator=generator) + 0.5
    if "softcap" in names:
        options["softcap"] = 5.0
        options["logit_scale"] = 1.5
    if "ignore_index" in names:
        # An id that counts from every rank's first row too.
        options["ignore_index"] = 0
        y[::3] = 0
    if "ignore all" in names:
        y[:] = -100
    grads = [torch.randn(T, generator=generator) for _ in range(3)]
    grads = [g * (torch.rand(T, generator=generator) < 0.5) for g in grads]
    return (h, w, y, bias), options, grads


def mine(x, shares, group):
    """This rank's rows."""
    return None if x is None else x.split(shares)[dist.get_rank(group)]


def moved_by(call):
    """The elements of each tensor that `call` reduces over the ranks, and what it returns."""
    moved, all_reduce = [], dist.all_reduce

    def recorded(tensor, *args, **options):
        moved.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        found = call()
    return moved, found


def values(name, impl, group):
    (h, w, y, bias), options, grads = case(name)
    shares = SHARES[CASES[name][3]][dist.get_world_size(group)]
    options["keep_logits"] = "keep_logits" in CASES[name][2]
    if "max_active_rows" in CASES[name][2]:
        # A few more than have a gradient.
        options["max_active_rows"] = T - 1
    head = functools.partial(logprob_entropy, impl=impl, vocab_group=group)
    inputs = h, mine(w, shares, group), y, mine(bias, shares, group)
    results = run(head, inputs, grads, **options)
    found = head(*inputs[:3], bias=inputs[3], statistics=MERGED, **options)
    same = all(map(torch.equal, results[:3], found[:3]))
    return {
        "results": results,
        "statistics": [getattr(found, name) for name in MERGED],
        "same bits": same,
    }


def extremes(group):
    """Rows that no product makes: logits from the weight, one token of hidden 1."""
    size, found = dist.get_world_size(group), {}
    for gap, best in itertools.product(GAPS, BEST):
        # Two words matter, and both are targets.
        z = torch.full((3 * size, 1), -100.0)
        z[0], z[best] = -gap, 0.0
        w = mine(z, [3] * size, group)
        y = torch.tensor([best, 0])
        found[gap, best] = ek.linear_logprob_entropy(
            ek.Head(torch.ones(2, 1), w, y), vocab_group=group
        )
    h, w, y = make("peaked", (9, 16, 3 * size), torch.float32)
    h[4, 3] = torch.nan
    w = mine(w, [3] * size, group).clone()
    head = functools.partial(logprob_entropy, vocab_group=group, statistics=MERGED)
    found["a bad row"] = head(h, w, y)
    h[4, 3] = 0
    if dist.get_rank(group) == 1:
        w[1, 2] = torch.nan
    found["a bad weight"] = head(h, w, y)
    return found


def masked_vocabulary(group):
    """All logits of rank 1 are -inf, and the target of one token is among them."""
    size = dist.get_world_size(group)
    h, w, y = peaked_head(9, 16, 20 * size)
    bias = torch.zeros(20 * size)
    bias[20:40], bias[3] = -torch.inf, -torch.inf
    y = torch.where(bias[y] < 0, 0, y)
    y[5] = 25
    x, weight = h.clone().requires_grad_(), mine(w, [20] * size, group).clone().requires_grad_()
    b = mine(bias, [20] * size, group)
    found = ek.linear_logprob_entropy(
        ek.Head(x, weight, y, bias=b), vocab_group=group, statistics=MERGED
    )
    kept = torch.arange(9) != 5
    (found.logprob[kept].sum() + found.entropy.sum()).backward()
    nowhere = ek.linear_logprob_entropy(
        ek.Head(h, weight.detach(), y, bias=torch.full_like(b, -torch.inf)), vocab_group=group
    )
    return {
        "found": [z.detach() for z in found if z is not None],
        "hidden": x.grad,
        "weight": weight.grad,
        "nowhere": nowhere[:3],
        "all": (h, w, y, bias),
    }


def cost(group):
    """What moves, what is multiplied, and the largest tensor."""
    size = dist.get_world_size(group)
    tokens, hidden, vocabulary = 1024, 8, 4096 * size
    h, w, y = torch.randn(tokens, hidden), torch.randn(4096, hidden), torch.arange(tokens)
    h, w = h.requires_grad_(), w.requires_grad_()
    head = functools.partial(logprob_entropy, vocab_group=group, impl="torch")
    with Watch() as watch:
        forward, found = moved_by(lambda: head(h, w, y))
        with Watch() as products:
            backward, _ = moved_by(found.logprob[:100].sum().backward)
    nothing, _ = moved_by(lambda: head(h.detach(), w, y).entropy.sum().backward())
    with_statistics, _ = moved_by(lambda: head(h, w, y, statistics=("sum_p2",)))
    return {
        "forward": forward,
        "backward": backward,
        "statistics": with_statistics,
        "frozen hidden": nothing,
        "products of backward": products.products / (hidden * vocabulary / size),
        "largest": watch.largest / (tokens * vocabulary / size),
    }


def losses(group, vocabulary_shares):
    """The loss by each way to select, one batch on all ranks; or without a group."""
    found = {}
    h, w, y = peaked_head(6 * 25, 24, sum(vocabulary_shares))
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(150, generator=generator) < 0.8
    advantage = torch.randn(150, generator=generator)
    old = ek.linear_logprob_entropy(ek.Head(h, w, y)).logprob + 0.1 * torch.randn(
        150, generator=generator
    )
    old = old.clamp_max(0)
    if group is not None:
        w = mine(w, vocabulary_shares, group)
    for name, options in {
        "fraction": {"fraction": 0.3},
        "threshold": {"threshold": 0.5},
        "selected": {"selected": torch.arange(150) % 4 == 0, "max_active_rows": 60},
        "main_grad": {"main_grad": torch.ones_like(w)},
    }.items():
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss, metrics = policy_loss(
            x, weight, y, old, advantage, mask, vocab_group=group, dual_clip=3.0, **options
        )
        loss.backward()
        dweight = options.get("main_grad", weight.grad)
        found[name] = {"loss": loss.detach(), "metrics": metrics, "h": x.grad, "w": dweight}
    return found


def errors(group):
    h, w, y = make("peaked", (9, 8, 30), torch.float32)
    rank, found = dist.get_rank(group), {}
    for name, arguments, options in [
        ("target", (h, w, y + 31 * dist.get_world_size(group)), {}),
        ("tokens", (h[: 9 - rank], w, y[: 9 - rank]), {}),
        ("no row", (h, w[:0], y), {}),
    ]:
        with pytest.raises(ValueError, match="got") as error:
            ek.linear_logprob_entropy(ek.Head(*arguments, **options), vocab_group=group)
        found[name] = str(error.value)
    return found


def results_of(group, size):
    results = {"cost": cost(group), "masked": masked_vocabulary(group), "errors": errors(group)}
    results["extremes"] = extremes(group)
    results["losses"] = losses(group, [100, 419] if size == 2 else [19, 0, 500])
    for impl in ("torch", *(name for name, why in MISSING.items() if why is None)):
        names = OF_TRITON if impl == "triton" else CASES
        results |= {(impl, name): values(name, impl, group) for name in names}
    return results


def work(rank, folder):
    """One of three processes: a group of all, and one of the first two."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        testing.mend_interpreter()
    with meeting(rank, folder, ranks=3):
        save_by_groups(rank, folder, (2, 3), results_of)
