"""Our own contestants, by the public names.

T tokens, D hidden, V vocabulary.
"""

import math
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.gpu.contestant import Contestant, Results, step
from benchmarks.gpu.problem import FRACTION, Problem
from entropy_kernels import _radix, backends, ops
from entropy_kernels._bench.step import our_forward
from entropy_kernels.verification import first_use


def contestants(
    device: torch.device, tokens: int, vocabulary: int, only: str | None = None
) -> list[Contestant]:
    """Every way to take a step: by the current entropies, a known threshold, a known mask.

    A known threshold both ways, whatever the table of tiles says: with the logits of the rows above
    it stored for backward, and with all recomputed.
    """
    found = []
    for impl in implementations(device):
        if only not in (None, impl):
            continue
        ways = [
            ("0.2", "20% of the tokens", 1 + 3 * FRACTION),
            ("threshold", "20%, threshold known beforehand", 1 + 3 * FRACTION),
            ("known", "20%, mask known beforehand", 3 * FRACTION),
        ]
        if impl == "triton":
            units = 1 + 3 * FRACTION - _stored(device, tokens, vocabulary)
            ways[1:2] = [
                ("threshold", f"{ways[1][1]}, logits stored", units),
                ("recomputed", f"{ways[1][1]}, recomputed", 1 + 3 * FRACTION),
            ]
        for way, label, units in ways:
            run = partial(_loss, impl=impl, way=way)
            label = f"ours ({impl}), {label}"
            found.append(Contestant(f"{impl}-{way}", label, run, units, exact=True))
        label = f"ours ({impl}), forward alone"
        run = partial(our_forward, impl=impl)
        found.append(Contestant(f"{impl}-forward", label, run, 1.0, exact=True))
    return found


def _stored(device: torch.device, tokens: int, vocabulary: int) -> float:
    """The share of all tokens whose logits fit, of those trained on."""
    room = backends.STORED_LOGITS_BYTES[device.type] // (4 * vocabulary)
    return min(FRACTION, room / tokens)


def kernels(name: str, problem: Problem) -> tuple[str, ...]:
    """The GPU kernels that a contestant of ours runs, as correctness.py names them."""
    impl, _, way = name.partition("-")
    if impl not in ("triton", "cuda"):
        return ()
    from entropy_kernels._triton.common import choice
    from entropy_kernels._triton.head_backward import launch as backward
    from entropy_kernels._triton.head_forward import launch as forward

    head = ek.Head(problem.hidden, problem.weight, problem.target)
    # Logits of rows known beforehand are kept; those above a threshold are stored.
    keeps, stores = way == "known", _stores(impl, way)
    named = {"keep_logits": keeps, "stores_rows": stores, "impl": impl}
    rows = {"forward": forward.preferred(head, **named)}
    if way != "forward":
        rows["dlogits"] = backward.preferred(problem.hidden, head, impl)
    options = ("keep_logits",) * keeps + ("stored",) * stores
    dtype, hidden = problem.hidden.dtype, problem.hidden.shape[1]
    found = []
    for op, row in rows.items():
        refused = first_use.refused(op, problem.hidden.device, dtype, hidden, options)
        variant = choice.first(row, refused).variant
        found.append(f"{op} {variant} {str(dtype).removeprefix('torch.')}")
    selects = [f"selection {impl}"] if way == "0.2" else []
    return (*found, *selects, *([f"ratio_loss {impl}"] if way != "forward" else []))


def _stores(impl: str, way: str) -> bool:
    """Whether forward stores the rows above a threshold, which csrc/cuda does not."""
    return impl == "triton" and way == "threshold"


def implementations(device: torch.device) -> list[str]:
    """The backends of the public functions on this device."""
    here = [x for x in backends.available() if x != "cpu" or device.type == "cpu"]
    # In the interpreter too, where the package does not count it.
    return list(dict.fromkeys([*here, *elementwise_implementations(device)]))


def elementwise_implementations(device: torch.device) -> list[str]:
    """The backends of selection and ratio loss; "auto" takes a GPU's on recorded GPUs only."""
    names = ("triton", "cuda")
    return ["torch", *(x for x in names if backends.why_not(x, device, "selection") is None)]


def top_entropy_mask(entropy_N: Tensor, mask_N: Tensor | None, impl: str) -> Tensor:
    """The public function, by one implementation."""
    return _radix.select_k_largest(entropy_N, mask_N, FRACTION, None, impl)


def selected_by(
    impl: str, entropy_N: Tensor, mask_N: Tensor | None, fraction: float
) -> tuple[Tensor, Tensor]:
    """The threshold and the mask of exactly k tokens, by one implementation."""
    found = _radix.kth_largest([(entropy_N, mask_N)], fraction, None, impl)
    return found.value, ops.select_largest(entropy_N, mask_N, found.value, found.quota, impl)


def entropy_threshold(entropy_N: Tensor, mask_N: Tensor | None, impl: str) -> Tensor:
    """The public function, by one implementation."""
    return _radix.kth_largest([(entropy_N, mask_N)], FRACTION, None, impl).value


def _loss(problem: Problem, *, impl: str, way: str) -> Results:
    ways: dict[str, dict[str, Any]] = {
        "0.2": {"fraction": FRACTION},
        "threshold": {"threshold": problem.threshold},
        "recomputed": {"threshold": problem.threshold},
        "known": {"selected": problem.selected},
    }
    with mock.patch.object(backends, "stores_rows", return_value=_stores(impl, way)):
        loss, _ = ek.high_entropy_policy_loss(
            ek.Head(problem.hidden, problem.weight, problem.target),
            problem.old_logprob,
            problem.advantage,
            problem.mask,
            # So that nothing waits for the GPU, and a CUDA graph can hold the step.
            backend=ek.Backend(impl, max_active_rows=math.ceil(FRACTION * problem.target.numel())),
            **ways[way],
        )
    return step(problem, loss)


def torch_logprob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Log-probabilities by the torch path, differentiable."""
    return ek.linear_logprob_entropy(ek.Head(hidden_TD, weight_VD, target_T), impl="torch").logprob


def has_triton() -> bool:
    """Whether the package has Triton kernels of the head, and this machine Triton."""
    try:
        import entropy_kernels._triton.head_backward.launch  # noqa: F401
    except ImportError:
        return False
    return True
