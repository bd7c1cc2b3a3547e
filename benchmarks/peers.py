"""Other libraries' heads, for the step that linear_logprob_entropy benchmarks.

A head maps hidden states, weight and targets to log-probabilities and entropies. Entropies are None
where it has none. A whole loss is one only where its options can mean the same as ours.

T tokens, B sequences, L their length, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.chunked_head import ChunkedHead
from entropy_kernels._bench.contestant import NO_ENTROPIES, TOLD
from entropy_kernels._bench.entrants import TORCH_HEADS
from entropy_kernels._bench.others import torch_head, trl_head, why_no_torch_head
from entropy_kernels._bench.step import SEQUENCES, EagerHead, plain_head

CHUNK = 512


class Peer(NamedTuple):
    """One head: for files and command line, for tables, and the modules that must be installed."""

    name: str
    label: str
    head: EagerHead
    needs: tuple[str, ...] = ()
    compiled: bool = False
    """Whether torch.compile's code computes it, in which products cannot be counted."""
    counted: EagerHead | None = None
    """A head with the same products, where one operation hides them."""
    computes: tuple[str, ...] = TOLD


def heads() -> list[Peer]:
    """The first is what the others are compared with: what TRL does, or PyTorch without it."""
    one, many = partial(_trl_head, sequences=1), partial(_trl_head, sequences=SEQUENCES)
    eager = Peer("eager", "eager: all logits, TRL's functions, one sequence", one)
    if find_spec("trl") is None:
        eager = Peer("eager", "eager: all logits, plain PyTorch", plain_head)
    batch = f"eager, {SEQUENCES} sequences, one after the other"
    cce = "cut-cross-entropy's torch_compile, no entropies"
    return [
        eager,
        Peer("eager-batch", batch, many, ("trl",)),
        Peer("trl", "TRL's fused head, of its kernels", trl_head, ("trl",)),
        Peer("liger", "Liger's fused head, its fallback for CPUs", liger_head, ("liger_kernel",)),
        Peer("chunked", "prime-rl's scheme: chunked, logits recomputed", ChunkedHead.apply),
        Peer("checkpoint", f"chunks of {CHUNK} tokens, checkpointed", _checkpointed_head),
        Peer(
            "cce",
            cce,
            _cce_head,
            ("cut_cross_entropy", "triton"),
            compiled=True,
            computes=NO_ENTROPIES,
        ),
        *(
            Peer(
                name,
                label,
                partial(torch_head, chunked=chunked),
                # In chunks the logits are multiplied again, within one operation.
                counted=_checkpointed_head if chunked else None,
                computes=NO_ENTROPIES,
            )
            for name, label, chunked in TORCH_HEADS
        ),
    ]


def why_not(name: str) -> str:
    """Why a step's contestant cannot run here, by its name; empty where it can."""
    if name.startswith("trl") and find_spec("trl") is None:
        return "needs trl"
    return why_no_torch_head() if name.startswith("lce") else ""


def refused(contestants: Mapping[str, tuple[str, Any]]) -> list[dict[str, str]]:
    """Entries of a result file for those of a label each that cannot run here."""
    return [
        {"name": name, "label": label, "refused": why_not(name)}
        for name, (label, _) in contestants.items()
        if why_not(name)
    ]


def liger_grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    selected_T: Tensor,
    *,
    compiled: bool,
) -> Tensor:
    """The clipped loss over `selected_T`, which it is told; `compiled` is of its loss alone.

    "bnpo" is the sum over the tokens of the mask over their number, which is equation 6.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_high=0.28, loss_type="bnpo"
    )
    found = loss(
        hidden_TD.view(SEQUENCES, -1, hidden_TD.shape[1]),
        weight_VD,
        target_T.view(SEQUENCES, -1),
        selected_T.float().view(SEQUENCES, -1),
        advantage_T.view(SEQUENCES, -1)[:, 0],
        old_per_token_logps=old_logprob_T.view(SEQUENCES, -1),
    )
    return found[0]


def _trl_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, sequences: int
) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits_BLV = (hidden_TD @ weight_VD.T).view(sequences, -1, weight_VD.shape[0])
    target_BL = target_T.view(sequences, -1)
    found = selective_log_softmax_and_entropy(logits_BLV, target_BL, entropy_requires_grad=False)
    return found[0].flatten(), found[1].flatten()


def liger_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Head

    nll_T, entropy_T = Head.apply(hidden_TD, weight_VD, target_T, 1.0, -100, 1, True)
    return -nll_T, entropy_T


def _checkpointed_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor]:
    chunks = [
        checkpoint(plain_head, hidden, weight_VD, target, use_reentrant=False)
        for hidden, target in zip(hidden_TD.split(CHUNK), target_T.split(CHUNK), strict=True)
    ]
    return torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks])


def _cce_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, None]:
    from cut_cross_entropy import linear_cross_entropy

    nll_T = linear_cross_entropy(
        hidden_TD, weight_VD, target_T, impl="torch_compile", reduction="none"
    )
    return -nll_T, None
