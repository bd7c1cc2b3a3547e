"""Stage `threshold`: the exact threshold of many entropies, and steps as CUDA graphs.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contest, correctness, ours, timing
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.problem import make_problem
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import Setting, setting_of

# Tokens of a step.
FEW = 32_768


def run(rows: Rows, job: Row) -> None:
    setting = setting_of(rows, job)
    _thresholds(setting)
    _few(setting)
    _graphs(setting)


def _thresholds(setting: Setting) -> None:
    count = setting.sizes.entropies
    entropy = torch.rand(count, device=setting.device).square_().mul_(3.5)
    mask = torch.rand(count, device=setting.device) < 0.9
    k = -(-int(mask.sum()) // 5)
    want = entropy[mask].sort(descending=True).values[k - 1]
    for impl in ours.elementwise_implementations(setting.device):
        for function in (ours.entropy_threshold, ours.top_entropy_mask):
            call = partial(function, entropy, mask, impl)
            run = partial(_selected, setting, call, want, k, impl)
            setting.rows.measure("threshold", f"{function.__name__}, {impl}", run)


def _selected(setting: Setting, call: Callable[[], Tensor], want: Tensor, k: int, impl: str) -> Row:
    refusal = correctness.refusal(setting.rows, [f"selection {impl}"])
    if refusal:
        return {"refused": refusal}
    got = _without_waiting(call, setting.device)
    right = got == want if got.ndim == 0 else got.sum() == k
    assert right, f"{got} where a sort gives {want}"
    row = timing.timed(call, setting.device, setting.sizes.rounds)
    count = setting.sizes.entropies
    return row | {"entropies": count, "gb_per_s": 4 * count / row["p50_ms"] / 1e6}


def _few(setting: Setting) -> None:
    """The exact selection of a step's tokens in a CUDA graph, as few launches as it takes."""
    entropy = torch.rand(min(FEW, setting.sizes.entropies), device=setting.device)
    for impl in ours.elementwise_implementations(setting.device):
        select = partial(ours.top_entropy_mask, entropy, None, impl)
        call = partial(_named, select)
        entry = Entry(f"selection of a step, {impl}", dict, call, (f"selection {impl}",))
        row = partial(_replay, setting, entry)
        setting.rows.measure("threshold", entry.name, row, entropies=entropy.numel())


def _named(select: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {"selected": select()}


def _without_waiting(call: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The result of a call that must not wait for the GPU; raises if it does."""
    if device.type != "cuda":
        return call()
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graphs(setting: Setting) -> None:
    """Our ways as CUDA graphs, which many small launches profit from: at the smallest D."""
    impl = "triton" if "triton" in ours.implementations(setting.device) else "torch"
    tokens, hidden = min(setting.sizes.more)
    vocabulary = setting.sizes.vocabulary
    shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    problem = make_problem(*shape.values(), setting.sizes.dtype, setting.device, seed=1)
    for one in ours.contestants(setting.device, tokens, vocabulary, impl):
        call = partial(one.run, problem)
        entry = Entry(one.name, dict, call, ours.kernels(one.name, problem))
        setting.rows.measure("graphs", one.name, partial(_replay, setting, entry), **shape)


def _replay(setting: Setting, entry: Entry) -> Row:
    """Times of a replay beside those of the call, after a check that both give the same."""
    refusal = correctness.refusal(setting.rows, entry.kernels)
    if refusal:
        return {"refused": refusal}
    if setting.device.type != "cuda":
        entry.call()
        return {"replays": False}
    results: dict[str, Tensor] = {}

    def call() -> None:
        results.update(entry.call())

    want: dict[str, Tensor] = {name: x.clone() for name, x in entry.call().items()}
    replay = timing.graph(call)
    replay()
    for name, x in want.items():
        assert torch.equal(results[name], x), f"{name} of a replay differs from the call's"
    calls: dict[str, Callable[[], Any]] = {"call": entry.call, "replay": replay}
    samples = timing.alternate(calls, setting.device, setting.sizes.rounds)
    contest.clear(setting.device)
    called = timing.spread(samples["call"])["p50_ms"]
    return timing.spread(samples["replay"]) | {"call_ms": called, "replays": True}
