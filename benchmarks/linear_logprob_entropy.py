"""The contestants of linear_logprob_entropy: one policy-gradient step through the LM head.

A step goes from hidden states and the head's weight to the clipped loss of the tokens of highest
entropy, and to the gradients of both. Every contestant computes the entropies of all tokens, except
those that are told the tokens beforehand, and none differentiates them. The dense contestants are
given the selection as a mask on their loss, which is what trainers do; ours finds it.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import entropy_kernels as ek
from benchmarks.runner import Contestant
from entropy_kernels import ops
from entropy_kernels.testing import peaked_head

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FRACTION = 0.2
FRACTIONS = (1.0, 0.5, 0.2, 0.1)
SEQUENCES = 8
CHUNK = 512
# Blocks of the bare products: the fastest of those that leave no [T, V] behind.
FLOOR_ROWS, FLOOR_VOCABULARY = 512, 2048


class Problem(NamedTuple):
    """One step's inputs. `selected` marks the tokens of highest entropy for each fraction."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    old_logprob: Tensor  # fp32 [T]
    advantage: Tensor  # fp32 [T], one value a sequence
    half_advantage: Tensor  # the same, zero for every other sequence
    mask: Tensor  # [T], all true
    logprob: Tensor  # fp64 [T]: the truth
    entropy: Tensor  # fp64 [T]: the truth
    selected: dict[float, Tensor]


def make_problem(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Problem:
    """Entropies of a reasoning model, ratios a few per cent off 1, one advantage a sequence."""
    hidden_TD, weight_VD, target_T = peaked_head(tokens, hidden, vocabulary, dtype=dtype)
    logprob_T, entropy_T = _truth(hidden_TD, weight_VD, target_T)
    generator = torch.Generator().manual_seed(1)
    noise_T = 0.02 * torch.randn(tokens, generator=generator)
    advantage_B = torch.randn(SEQUENCES, generator=generator)
    sequence_T = torch.arange(tokens) * SEQUENCES // tokens
    half_B = advantage_B * (torch.arange(SEQUENCES) % 2)
    return Problem(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        target_T,
        logprob_T.float() + noise_T,
        advantage_B[sequence_T],
        half_B[sequence_T],
        torch.ones(tokens, dtype=torch.bool),
        logprob_T,
        entropy_T,
        {f: ek.top_entropy_mask(entropy_T.float(), fraction=f) for f in FRACTIONS},
    )


def policy_loss(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, selected_T: Tensor
) -> Tensor:
    """The clipped loss (arXiv 2506.01939v2, equation 6), as a trainer writes it."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    clipped_T = ratio_T.clamp(0.8, 1.28)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    return (loss_T * selected_T).sum() / selected_T.sum()


def truth(problem: Problem, fraction: float, half: bool) -> dict[str, Tensor]:
    """What every contestant should return, in fp64 from the inputs as they are."""
    advantage_T = problem.half_advantage if half else problem.advantage
    selected_T = problem.selected[fraction]
    logprob_T = problem.logprob.clone().requires_grad_()
    loss = policy_loss(logprob_T, problem.old_logprob.double(), advantage_T.double(), selected_T)
    (grad_T,) = torch.autograd.grad(loss, logprob_T)
    weight_VD = problem.weight.detach().double()
    dhidden_TD = torch.zeros(problem.hidden.shape, dtype=torch.float64)
    dweight_VD = torch.zeros_like(weight_VD)
    for rows_R in grad_T.nonzero().squeeze(1).split(256):
        hidden_RD = problem.hidden.detach()[rows_R].double()
        dz_RV = -(hidden_RD @ weight_VD.T).softmax(1)
        dz_RV[torch.arange(len(rows_R)), problem.target[rows_R]] += 1
        dz_RV *= grad_T[rows_R].unsqueeze(1)
        dhidden_TD[rows_R] = dz_RV @ weight_VD
        dweight_VD.addmm_(dz_RV.T, hidden_RD)
    return {
        "loss": loss.detach(),
        "dhidden": dhidden_TD,
        "dweight": dweight_VD,
        "logprob": problem.logprob,
        "entropy": problem.entropy,
    }


def _truth(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    weight_VD = weight_VD.double()
    logprob_T, entropy_T = torch.empty(2, len(target_T), dtype=torch.float64)
    for rows in torch.arange(len(target_T)).split(256):
        logp_RV = (hidden_TD[rows].double() @ weight_VD.T).log_softmax(1)
        logprob_T[rows] = logp_RV.gather(1, target_T[rows].unsqueeze(1)).squeeze(1)
        entropy_T[rows] = -(logp_RV.exp() * logp_RV).sum(1)
    return logprob_T, entropy_T


def _step(problem: Problem, loss: Tensor) -> dict[str, Tensor]:
    dhidden_TD, dweight_VD = torch.autograd.grad(loss, [problem.hidden, problem.weight])
    return {"loss": loss.detach(), "dhidden": dhidden_TD, "dweight": dweight_VD}


def _dense(head: Head, problem: Problem) -> dict[str, Tensor]:
    """The loss of all tokens, times a mask."""
    logprob_T, _ = head(problem.hidden, problem.weight, problem.target)
    selected_T = problem.selected[FRACTION]
    loss = policy_loss(logprob_T, problem.old_logprob, problem.advantage, selected_T)
    return _step(problem, loss)


def _plain_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(1)
    fixed_TV = logp_TV.detach()
    entropy_T = -(fixed_TV.exp() * fixed_TV).sum(1)
    return logp_TV.gather(1, target_T.unsqueeze(1)).squeeze(1), entropy_T


def _trl_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, sequences: int
) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits_BLV = (hidden_TD @ weight_VD.T).view(sequences, -1, weight_VD.shape[0])
    target_BL = target_T.view(sequences, -1)
    found = selective_log_softmax_and_entropy(logits_BLV, target_BL, entropy_requires_grad=False)
    return found[0].flatten(), found[1].flatten()


def _trl_fused_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as vocabulary_chunk

    found = ChunkedLogProbFunction.apply(
        hidden_TD, weight_VD, None, target_T, 1.0, vocabulary_chunk, None, 1.0, ("entropy",)
    )
    return found[0], found[1]


def _liger_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Head

    nll_T, entropy_T = Head.apply(hidden_TD, weight_VD, target_T, 1.0, -100, 1, True)
    return -nll_T, entropy_T


def _checkpointed_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor]:
    chunks = [
        checkpoint(_plain_head, hidden, weight_VD, target, use_reentrant=False)
        for hidden, target in zip(hidden_TD.split(CHUNK), target_T.split(CHUNK), strict=True)
    ]
    return torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks])


def _plain(problem: Problem) -> dict[str, Tensor]:
    return _dense(_plain_head, problem)


def _compiled(problem: Problem) -> dict[str, Tensor]:
    return _compiler()(problem)


@cache
def _compiler() -> Callable[[Problem], dict[str, Tensor]]:
    return torch.compile(_plain)


def _ours(
    problem: Problem, *, impl: str, fraction: float, known: bool, half: bool
) -> dict[str, Tensor]:
    loss, _ = ek.high_entropy_policy_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        problem.old_logprob,
        problem.half_advantage if half else problem.advantage,
        problem.mask,
        fraction=fraction,
        selected=problem.selected[fraction] if known else None,
        impl=impl,
    )
    return _step(problem, loss)


def _our_forward(problem: Problem, *, impl: str) -> dict[str, Tensor]:
    with torch.no_grad():
        found = ek.linear_logprob_entropy(problem.hidden, problem.weight, problem.target, impl=impl)
    return {"logprob": found.logprob, "entropy": found.entropy}


def _floor(problem: Problem) -> dict[str, Tensor]:
    """The products of one step at FRACTION and nothing else, by torch.mm in the inputs' dtype."""
    hidden_TD, weight_VD = problem.hidden.detach(), problem.weight.detach()
    active = int(problem.selected[FRACTION].sum())
    block = hidden_TD.new_empty(FLOOR_ROWS, FLOOR_VOCABULARY)
    dhidden_TD = hidden_TD.new_empty(FLOOR_ROWS, hidden_TD.shape[1])
    dweight_VD = weight_VD.new_empty(FLOOR_VOCABULARY, weight_VD.shape[1])
    for weight in weight_VD.split(FLOOR_VOCABULARY):
        for hidden in hidden_TD.split(FLOOR_ROWS):
            torch.mm(hidden, weight.T, out=_head_of(block, len(hidden), len(weight)))
        for hidden in hidden_TD[:active].split(FLOOR_ROWS):
            z = torch.mm(hidden, weight.T, out=_head_of(block, len(hidden), len(weight)))
            torch.mm(z.T, hidden, out=dweight_VD[: len(weight)])
            torch.mm(z, weight, out=dhidden_TD[: len(hidden)])
    return {}


def _head_of(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer.view(-1)[: rows * columns].view(rows, columns)


def contestants(impls: tuple[str, ...] = ops.IMPLEMENTATIONS) -> list[Contestant]:
    """All that can run here; the first is what the others are compared with."""
    setting = {"fraction": FRACTION, "half": False}
    found = [
        Contestant(name, label, partial(_dense, head), setting) for name, label, head in _heads()
    ]
    label = "torch.compile of all logits"
    found.append(Contestant("compile", label, _compiled, setting, uncompiled=_plain))
    for impl in impls:
        found += _our_contestants(impl)
    label = f"floor: the products of {FRACTION:.0%} by torch.mm alone"
    return [*found, Contestant("floor", label, _floor, setting)]


def _heads() -> list[tuple[str, str, Head]]:
    """Names and labels of the dense heads, and what goes from inputs to log-probs and entropies."""
    found: list[tuple[str, str, Head]] = []
    if find_spec("trl") is None:
        found.append(("eager", "eager: all logits, plain PyTorch", _plain_head))
    else:
        one, many = partial(_trl_head, sequences=1), partial(_trl_head, sequences=SEQUENCES)
        found += [
            ("eager", "eager: all logits, TRL's functions, one sequence", one),
            ("eager-batch", f"eager, {SEQUENCES} sequences, one after the other", many),
            ("trl", "TRL's fused head", _trl_fused_head),
        ]
    if find_spec("liger_kernel") is not None:
        found.append(("liger", "Liger's fused head, its fallback for CPUs", _liger_head))
    found.append(("checkpoint", f"chunks of {CHUNK} tokens, checkpointed", _checkpointed_head))
    return found


def _our_contestants(impl: str) -> list[Contestant]:
    found = []
    for fraction, known, half in [
        *((fraction, False, False) for fraction in FRACTIONS),
        (FRACTION, True, False),
        (FRACTION, False, True),
    ]:
        name = f"{impl}-{fraction:g}" + "-known" * known + "-half" * half
        label = f"ours ({impl}), {fraction:.0%} of the tokens"
        label += ", known beforehand" * known + ", half of the advantages zero" * half
        run = partial(_ours, impl=impl, fraction=fraction, known=known, half=half)
        found.append(Contestant(name, label, run, {"fraction": fraction, "half": half}, exact=True))
    setting = {"fraction": FRACTION, "half": False}
    label = f"ours ({impl}), forward alone"
    run = partial(_our_forward, impl=impl)
    return [*found, Contestant(f"{impl}-forward", label, run, setting, exact=True)]
