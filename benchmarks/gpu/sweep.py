"""Stage `sweep`: every candidate tile at every hidden size, checked, then timed in alternation.

A dlogits tile is timed within the backward of a fifth of the rows: what is around it is the same
for all. "forward_store" is a forward and that backward with the threshold known: "cublas" stores
the logits of the rows above it, as many as the public function would; the others store none. `tune`
writes the table from these rows.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import candidates, correctness, ours, timing
from benchmarks.gpu.contestant import FP32, ROUNDED_ONCE, WrongResultError, relative_error
from benchmarks.gpu.problem import Problem, make_problem
from benchmarks.gpu.rows import Row, reason
from benchmarks.gpu.setting import Setting
from entropy_kernels import backends
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels.verification.launches import launch_backward, launch_forward

STAGE = "sweep"
OPS = ("forward", "forward_store", "dlogits")


def run(setting: Setting) -> None:
    refusal = "" if ours.has_triton() else "the package has no Triton kernels of the head"
    refusal = refusal or correctness.refusal(setting.rows)
    if refusal:
        setting.rows.log(f"{STAGE}: {refusal}")
        return
    tokens = setting.tokens[0]
    for hidden in setting.hidden:
        shape = {"tokens": tokens, "hidden": hidden, "vocabulary": setting.vocabulary}
        problem: Problem | None = None
        for op in OPS:
            tiles = getattr(candidates, op)(setting.device)
            names = [f"{op} {candidates.name(tile)}" for tile in tiles]
            if all(setting.rows.has(STAGE, name, **shape) for name in names):
                continue
            if problem is None:
                sizes = (tokens, hidden, setting.vocabulary)
                problem = make_problem(*sizes, setting.dtype, setting.device, seed=hidden)
            _measure(setting, op, tiles, problem, shape)


def _measure(
    setting: Setting, op: str, tiles: tuple[Tile, ...], problem: Problem, shape: dict[str, int]
) -> None:
    found: dict[Tile, Row] = {}
    calls: dict[str, Callable[[], None]] = {}
    for tile in tiles:
        call = _call(op, tile, problem)
        try:
            found[tile] = {"error_of_norm": _check(op, call, problem)}
            calls[candidates.name(tile)] = call
        except Exception as error:
            # A tile that does not compile or is wrong is a result.
            found[tile] = {"refused": reason(error)}
    samples = timing.alternate(calls, setting.device, setting.rounds)
    for tile, row in found.items():
        name = candidates.name(tile)
        if name in samples:
            row |= timing.spread(samples[name])
        if name in samples and op == "forward":
            row = timing.rate(row, 1.0, **shape)
        setting.rows.add(STAGE, f"{op} {name}", **shape, **row, op=op, tile=list(tile[:8]))


def _call(op: str, tile: Tile, problem: Problem) -> Callable[[], Any]:
    inputs = (problem.hidden.detach(), problem.weight.detach(), problem.target, None)
    if op == "forward":
        return lambda: launch_forward(inputs, tile, {})
    gradients = [problem.advantage * problem.selected, None, None]
    options: dict[str, Any] = {"max_active_rows": int(problem.selected.sum())}
    if op == "dlogits":
        found = launch_forward(inputs, None, {})
        return lambda: launch_backward(gradients, inputs, found, tile, options)
    if tile.variant == "cublas":
        most = backends.STORED_LOGITS_BYTES[problem.hidden.device.type]
        rows = min(options["max_active_rows"], most // (4 * problem.weight.shape[0]))
        options |= {"store_above": problem.threshold, "store_rows": rows}

    def step() -> list[torch.Tensor]:
        found = launch_forward(inputs, tile, options)
        return launch_backward(gradients, inputs, found, None, options)

    return step


def _check(op: str, call: Callable[[], Any], problem: Problem) -> float:
    """Against the truth; a backward against that of the torch path, which the tests hold to it."""
    got = call()
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
