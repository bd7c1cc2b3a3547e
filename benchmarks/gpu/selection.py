"""Stages `threshold` and `graphs`: the exact threshold of many entropies, and replays.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import correctness, ours, timing
from benchmarks.gpu.problem import make_problem
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting


def run_threshold(setting: Setting) -> None:
    count = setting.entropies
    entropy = torch.rand(count, device=setting.device).square_().mul_(3.5)
    mask = torch.rand(count, device=setting.device) < 0.9
    k = -(-int(mask.sum()) // 5)
    want = entropy[mask].sort(descending=True).values[k - 1]
    for impl in ours.elementwise_implementations(setting.device):
        refusal = correctness.refusal(setting.rows) if impl == "triton" else ""
        if refusal:
            setting.rows.log(f"threshold: {refusal}")
            continue
        for function in (ours.entropy_threshold, ours.top_entropy_mask):
            call = partial(function, entropy, mask, impl)
            run = partial(_selected, setting, call, want, k)
            setting.rows.measure("threshold", f"{function.__name__}, {impl}", run)


def _selected(setting: Setting, call: Callable[[], Tensor], want: Tensor, k: int) -> Row:
    got = _without_waiting(call, setting.device)
    right = got == want if got.ndim == 0 else got.sum() == k
    assert right, f"{got} where a sort gives {want}"
    row = timing.timed(call, setting.device, setting.rounds)
    count = setting.entropies
    return row | {"entropies": count, "gb_per_s": 4 * count / row["p50_ms"] / 1e6}


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


def run_graphs(setting: Setting) -> None:
    """Forward, and the step with its mask known, as CUDA graphs: as often as they are asked for."""
    impl = "triton" if "triton" in ours.implementations(setting.device) else "torch"
    refusal = correctness.refusal(setting.rows) if impl == "triton" else ""
    if refusal:
        setting.rows.log(f"graphs: {refusal}")
        return
    tokens = setting.tokens[0]
    for hidden in setting.hidden:
        shape = {"tokens": tokens, "hidden": hidden, "vocabulary": setting.vocabulary}
        own = ours.contestants(setting.device, tokens, setting.vocabulary, impl)
        wanted = {c.name: c for c in own}
        if all(setting.rows.has("graphs", name, **shape) for name in wanted):
            continue
        sizes = (tokens, hidden, setting.vocabulary)
        problem = make_problem(*sizes, setting.dtype, setting.device, seed=1)
        for name, contestant in wanted.items():
            run = partial(_replay, setting, partial(contestant.run, problem))
            setting.rows.measure("graphs", name, run, **shape)


def _replay(setting: Setting, run: Callable[[], Any]) -> Row:
    """Times of a replay beside those of the call, after a check that both give the same."""
    if setting.device.type != "cuda":
        run()
        return {"replays": False}
    results: dict[str, Tensor] = {}

    def call() -> None:
        results.update(run())

    want = {name: x.clone() for name, x in run().items()}
    replay = timing.graph(call)
    replay()
    for name, x in want.items():
        assert torch.equal(results[name], x), f"{name} of a replay differs from the call's"
    samples = timing.alternate({"call": run, "replay": replay}, setting.device, setting.rounds)
    called = timing.spread(samples["call"])["p50_ms"]
    return timing.spread(samples["replay"]) | {"call_ms": called, "replays": True}
