"""Stage `sweep`: every candidate tile at every hidden size, checked, then timed in alternation.

A dlogits tile is timed within the backward of a fifth of the rows: what is around it is the same
for all. "forward_store" is a forward and that backward with the threshold known: "cublas" stores
the logits of the rows above it, as many as the public function would; the others store none. `tune`
writes the table from these rows.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import candidates, contest, correctness, ours
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.contestant import FP32, ROUNDED_ONCE, WrongResultError, relative_error
from benchmarks.gpu.problem import Problem, make_problem
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import setting_of
from entropy_kernels import backends
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels.verification.launches import launch_backward, launch_forward

STAGE = "sweep"
OPS = ("forward", "forward_store", "dlogits")


def run(rows: Rows, job: Row) -> None:
    """All ops at one hidden size."""
    if not ours.has_triton():
        rows.log(f"{STAGE}: no Triton is here")
        return
    setting = setting_of(rows, job)
    sizes = (setting.sizes.base[0], job["hidden"], setting.sizes.vocabulary)
    shape = dict(zip(("tokens", "hidden", "vocabulary"), sizes, strict=True))
    problem = make_problem(*sizes, setting.sizes.dtype, setting.device, seed=job["hidden"])
    for op in OPS:
        tiles = getattr(candidates, op)(rows.about["architecture"])
        entries = [_entry(op, tile, problem) for tile in tiles]
        contest.hold(setting, STAGE, f"{op} D={job['hidden']}", entries, shape)


def _entry(op: str, tile: Tile, problem: Problem) -> Entry:
    call = _call(op, tile, problem)

    def look() -> Row:
        return {"op": op, "tile": list(tile[:-1]), "error_of_norm": _check(op, call(), problem)}

    named = "dlogits" if op == "dlogits" else "forward"
    dtype = str(problem.hidden.dtype).removeprefix("torch.")
    kernels = (correctness.kernel(named, tile.variant, dtype),)
    return Entry(f"{op} {candidates.name(tile)}", look, call, kernels, float(op == "forward"))


def _call(op: str, tile: Tile, problem: Problem) -> Callable[[], Any]:
    inputs = (problem.hidden.detach(), problem.weight.detach(), problem.target, None)
    if op == "forward":
        return lambda: launch_forward(inputs, tile, {})
    gradients = [problem.advantage * problem.selected, None, None]
    options: dict[str, Any] = {"max_active_rows": int(problem.selected.sum())}
    if op == "dlogits":
        found: list[Any] = []

        def backward() -> list[torch.Tensor]:
            # Within the first call, where a failure is a row.
            found[:] = found or [launch_forward(inputs, None, {})]
            return launch_backward(gradients, inputs, found[0], tile, options)

        return backward
    if tile.variant == "cublas":
        most = backends.STORED_LOGITS_BYTES[problem.hidden.device.type]
        rows = min(options["max_active_rows"], most // (4 * problem.weight.shape[0]))
        options |= {"store_above": problem.threshold, "store_rows": rows}

    def step() -> list[torch.Tensor]:
        found = launch_forward(inputs, tile, options)
        return launch_backward(gradients, inputs, found, None, options)

    return step


def _check(op: str, got: Any, problem: Problem) -> float:
    """Against the truth; a backward against that of the torch path, which the tests hold to it."""
    if op == "forward":
        pairs = [(got.logprob, "logprob"), (got.entropy, "entropy")]
        errors = [relative_error(x, problem.truth[name]) for x, name in pairs]
        allowed = FP32
    else:
        hidden, weight = problem.hidden, problem.weight
        logprob = ours.torch_logprob(hidden, weight, problem.target)
        gradient = problem.advantage * problem.selected
        want = torch.autograd.grad(logprob, [hidden, weight], gradient)
        errors = [relative_error(x, y) for x, y in zip(got, want, strict=True)]
        allowed = FP32 if problem.hidden.dtype == torch.float32 else ROUNDED_ONCE
    worst = max(errors)
    if not worst <= allowed:
        raise WrongResultError(f"off by {worst:.2g} of the norm; {allowed} is allowed")
    return worst
