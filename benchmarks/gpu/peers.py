"""Other libraries' kernels for the same step; each is imported when it runs.

The dense ones get the selection as a mask on their loss, as trainers do; the composition computes
it. T tokens, D hidden, V vocabulary, R selected tokens.
"""

import importlib
import os
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.gpu.contestant import Contestant, Results, step
from benchmarks.gpu.problem import FRACTION, Problem
from benchmarks.peers import liger_grpo_loss, liger_head
from entropy_kernels._bench.others import trl_head
from entropy_kernels._bench.step import Head, plain_head, policy_loss


def baselines(quick: bool) -> list[Contestant]:
    """The definition, and what the compiler makes of it."""
    backend = "eager" if quick else "inductor"
    return [
        Contestant("eager", "eager: all logits, fp32 softmax", partial(_dense, plain_head), 3.0),
        Contestant("compile", "torch.compile of the same", partial(_compiled, backend), 3.0),
    ]


def contestants(quick: bool) -> list[Contestant]:
    """Other libraries'; verl's is wrong where the vocabulary is no multiple of 1024."""
    found = [
        Contestant("trl", "TRL's chunked head", partial(_dense, trl_head), 4.0),
        Contestant("torch-lce", "torch's linear_cross_entropy, no entropy", _torch_lce, 4.0),
        Contestant("flsce", "Liger FLSCE, all rows", partial(_dense, flsce), 4.0),
        Contestant("flsce-composed", "Liger FLSCE, all rows, top 20%, again", _composed, 1.8),
        Contestant("flsce-known", "Liger FLSCE, mask known", _known, 4 * FRACTION),
        Contestant("flsce-forward", "Liger FLSCE, forward alone", partial(_forward, flsce), 1.0),
        Contestant("verl", "verl's Triton kernel", partial(_dense, verl), 4.0),
        Contestant("verl-forward", "verl's, forward alone", partial(_forward, verl), 1.0),
    ]
    for tf32 in (False, True):
        label = f"Liger GRPO loss, {'TF32' if tf32 else 'fp32'} products, no entropy"
        name = "liger-grpo" + "-tf32" * tf32
        found.append(Contestant(name, label, partial(_grpo, tf32=tf32, compiled=not quick), 4.0))
    for name, filtered in (("cce-filtered", "high"), ("cce-exact", None)):
        label = f"cut-cross-entropy, {name.removeprefix('cce-')}, no entropy"
        found.append(
            Contestant(name, label, partial(_dense, partial(cce, filter_eps=filtered)), 4.0)
        )
    return found


def flsce(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    # Its own check of targets waits for the GPU; ours are right.
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    return liger_head(hidden_TD, weight_VD, target_T)


def cce(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, filter_eps: str | None
) -> tuple[Tensor, None]:
    head = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return -head(hidden_TD, weight_VD, target_T, reduction="none", filter_eps=filter_eps), None


def _torch_lce(problem: Problem) -> Results:
    """Its chunked form, by torch's own choice of chunks."""
    head = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if head is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def logprob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, None]:
        return -head(hidden_TD, weight_VD, target_T, reduction="none", options=options), None

    return _dense(logprob, problem)


def verl(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    return _verl_kernel()(hidden_TD, weight_VD, target_T, 1.0, "none")


@cache
def _verl_kernel() -> Any:
    """Without the imports of verl's package, which wants most of a training stack."""
    folder = next((Path(x) for x in sys.path if (Path(x) / "verl/utils/kernel").is_dir()), None)
    if folder is None:
        raise ImportError("no folder of sys.path has verl/utils/kernel")
    for name in ("verl", "verl.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def _dense(head: Head, problem: Problem) -> Results:
    """The loss of all tokens, times a mask."""
    logprob_T, _ = head(problem.hidden, problem.weight, problem.target)
    loss = policy_loss(logprob_T.float(), problem.old_logprob, problem.advantage, problem.selected)
    return step(problem, loss)


def _compiled(backend: str, problem: Problem) -> Results:
    return _compiler(backend)(problem)


@cache
def _compiler(backend: str) -> Callable[[Problem], Results]:
    return partial(_dense, torch.compile(plain_head, backend=backend, dynamic=False))


def _forward(head: Head, problem: Problem) -> Results:
    with torch.no_grad():
        logprob_T, entropy_T = head(problem.hidden, problem.weight, problem.target)
    assert entropy_T is not None
    return {"logprob": logprob_T, "entropy": entropy_T}


def _composed(problem: Problem) -> Results:
    """All rows without gradient, then the selected rows with gradient."""
    with torch.no_grad():
        _, entropy_T = flsce(problem.hidden, problem.weight, problem.target)
    return _on_rows(problem, ek.top_entropy_mask(entropy_T.float(), fraction=FRACTION))


def _known(problem: Problem) -> Results:
    return _on_rows(problem, problem.selected)


def _on_rows(problem: Problem, selected_T: Tensor) -> Results:
    rows_R = selected_T.nonzero().squeeze(1)
    logprob_R, _ = flsce(problem.hidden[rows_R], problem.weight, problem.target[rows_R])
    loss = policy_loss(
        logprob_R.float(),
        problem.old_logprob[rows_R],
        problem.advantage[rows_R],
        torch.ones_like(rows_R, dtype=torch.bool),
    )
    return step(problem, loss)


def _grpo(problem: Problem, *, tf32: bool, compiled: bool) -> Results:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        loss = liger_grpo_loss(
            problem.hidden,
            problem.weight,
            problem.target,
            problem.old_logprob,
            problem.advantage,
            problem.selected,
            compiled=compiled,
        )
        return step(problem, loss)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
