"""The options of losses and of the head, with tensors on a GPU that need not be there.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import losses
from entropy_kernels._rows import FILLED_BY_CSRC_CUDA, OF_SETS, STATISTICS
from entropy_kernels.loss_terms import AGGREGATIONS, CORRECTIONS, KL_TYPES
from tests.host_waits import backward

B, L, D, V = 4, 16, 64, 1000
T, MOST = B * L, 13
Options = dict[str, Any]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def bools(*shape: int) -> Tensor:
    return floats(*shape) > 0


def make_head(*shape: int, size: int = D, **options: Any) -> ek.Head:
    """A head on states of `size` numbers."""
    hidden, weight = (floats(*x, size, dtype=torch.bfloat16) for x in (shape, (V,)))
    target = torch.randint(V, shape, device="cuda")
    return ek.Head(hidden.requires_grad_(), weight.requires_grad_(), target, **options)


def policy_loss(impl: str, options: Options, head: ek.Head | None = None) -> None:
    """Forward and backward of the loss on a head."""
    tokens = {"old_logprob": floats(B, L), "advantage": floats(B), "mask": bools(B, L)}
    backend = ek.Backend(impl, max_active_rows=MOST)
    tokens |= {"backend": backend} | options
    loss, _ = ek.high_entropy_policy_loss(make_head(B, L) if head is None else head, **tokens)
    backward(loss)


def head_alone(impl: str, options: Options, **of_head: Any) -> None:
    """Forward and backward of the head, all outputs with a gradient."""
    bound = {"max_active_rows": MOST} | options
    found = ek.linear_logprob_entropy(make_head(B, L, **of_head), **bound, impl=impl)
    outputs = *found[:3], found.token_logprobs
    backward(sum(x.sum() for x in outputs if x is not None))


def with_loss(name: str) -> Options:
    numbers = {"dr_grpo": 8.0}
    return {"loss_type": name, "denominator": numbers.get(name, "selected")}


def with_aggregation(name: str) -> Options:
    number = name == "seq-mean-token-sum-norm"
    return {
        "denominator": 8.0 if number else "selected",
        "aggregation": ek.Aggregation(name),
    }


# The options of a loss; tensors are made as they are called for, on the fake GPU.
LOSSES: dict[str, Callable[[], Options]] = {
    **{f"loss_type={x}": functools.partial(with_loss, x) for x in losses.LOSSES},
    **{f"aggregation={x}": functools.partial(with_aggregation, x) for x in AGGREGATIONS},
    **{
        f"kl={kind} on={on}": lambda kind=kind, on=on: {
            "kl": ek.KL(0.1, kind, on, floats(B, L)),
        }
        for kind, on in itertools.product(KL_TYPES, ("selected", "all"))
    },
    **{
        f"correction={kind}": lambda kind=kind: {
            "correction": ek.Correction(kind, 2.0, 0.5, floats(B, L)),
        }
        for kind in (None, *CORRECTIONS)
    },
    "correction of the current policy": lambda: {
        "correction": ek.Correction("tis", 2.0, 0.5, floats(B, L), of="current"),
    },
    "kl per token": lambda: {"kl": ek.KL(floats(B, L), reference_logprob=floats(B, L))},
    "kl of one tensor": lambda: {"kl": ek.KL(floats(), reference_logprob=floats(B, L))},
    "kl as a metric": lambda: {"kl": ek.KL(reference_logprob=floats(B, L))},
    "own function": lambda: {"loss_type": lambda new, old, advantage, mask: -new * advantage},
    "partial": lambda: {"loss_type": functools.partial(losses.sapo, tau_neg=1.1)},
    "sequence_over=selected": lambda: {
        "loss_type": "gspo",
        "aggregation": ek.Aggregation(sequence_over="selected"),
    },
    "dual_clip": lambda: {"dual_clip": 3.0},
    "clips": lambda: {"clip_low": 0.1, "clip_high": 0.3},
    "clips per token": lambda: {"clip_low": floats(B, L), "clip_high": floats(B, L)},
    "clips of one tensor": lambda: {"clip_low": floats(), "clip_high": 0.3},
    "dual_clip with clips per token": lambda: {"dual_clip": 3.0, "clip_low": floats(B, L)},
    "denominator=all": lambda: {"denominator": "all"},
    "denominator=8": lambda: {"denominator": 8.0},
    "denominator on the GPU": lambda: {"denominator": floats()},
    "denominator on the CPU": lambda: {"denominator": torch.ones((), dtype=torch.int64)},
    "num_sequences": lambda: {
        "loss_type": "grpo",
        "aggregation": ek.Aggregation(num_sequences=torch.ones(1)),
    },
    "token_weight": lambda: {"aggregation": ek.Aggregation(token_weight=floats(B, L))},
    "soft mask": lambda: {"aggregation": ek.Aggregation(token_weight=bools(B, L))},
    "entropy bonus": lambda: {"entropy_bonus": ek.EntropyBonus(0.01)},
    "entropy bonus on all": lambda: {"entropy_bonus": ek.EntropyBonus(0.01, "all")},
    "entropy bonus of a tensor": lambda: {"entropy_bonus": ek.EntropyBonus(floats())},
    "entropy bonus of a CPU's tensor": lambda: {"entropy_bonus": ek.EntropyBonus(torch.ones(()))},
    "advantage per token": lambda: {"advantage": floats(B, L)},
    "on-policy": lambda: {"old_logprob": None},
}
# How tokens are chosen and what the head is, beside the loss.
CHOICES: dict[str, Callable[[], Options]] = {
    **{
        f"fraction which={which} scope={scope}": lambda which=which, scope=scope: {
            "fraction": 0.5,
            "selection": ek.Selection(which, scope),
        }
        for which, scope in itertools.product(("top", "bottom", "random"), ("batch", "sequence"))
    },
    "threshold": lambda: {"threshold": 0.5},
    "threshold with a tolerance": lambda: {
        "threshold": 0.5,
        "selection": ek.Selection(threshold_tolerance=1e-5),
    },
    "threshold on the GPU": lambda: {"threshold": floats()},
    "threshold on the CPU": lambda: {"threshold": torch.ones((), dtype=torch.float64)},
    "selected": lambda: {"selected": bools(B, L)},
}
HEADS: dict[str, Callable[[], Options]] = {
    "plain": dict,
    "temperature": lambda: {"temperature": 0.7},
    "temperature of one tensor": lambda: {"temperature": floats(1).abs()},
    "temperature per token": lambda: {"temperature": floats(B, L).abs()},
    "softcap": lambda: {"softcap": 30.0},
    "logit_scale": lambda: {"logit_scale": 0.5},
    "bias": lambda: {"bias": floats(V, dtype=torch.bfloat16).requires_grad_()},
    "ignore_index": lambda: {"ignore_index": 0},
}


CALLS: dict[str, Callable[[], Options]] = {
    "keep_logits": lambda: {"keep_logits": True},
    "keep_logits_above": lambda: {"keep_logits_above": 0.5},
    "keep_logits_above on the GPU": lambda: {"keep_logits_above": floats()},
    "statistics": lambda: {"statistics": STATISTICS[:FILLED_BY_CSRC_CUDA]},
    "every statistic": lambda: {"statistics": STATISTICS},
    "a bound of no row": lambda: {"max_active_rows": 0},
}


IDS: dict[str, Callable[[], Options]] = {
    "shared": lambda: {"token_ids": torch.randint(V, (5,), device="cuda")},
    "per token": lambda: {"token_ids": torch.randint(V, (B, L, 3), device="cuda")},
    "per token, kept logits": lambda: {
        "token_ids": torch.randint(V, (B, L, 3), device="cuda"),
        "keep_logits": True,
    },
}


def sets_of_three() -> ek.Support:
    ids = torch.randint(V, (3 * T,), device="cuda")
    return ek.Support(ids, 3 * torch.arange(T + 1, device="cuda"))


SETS: dict[str, Callable[[], Options]] = {
    "support": lambda: {"support": sets_of_three()},
    "support with statistics": lambda: {"support": sets_of_three(), "statistics": OF_SETS},
}
