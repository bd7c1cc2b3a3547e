"""Stages `peers` and `verl`: every contestant checked, timed in alternation, and its peak memory.

All of one shape are measured together, so that whatever drifts drifts for all; the rows of a shape
are written when it is done.
"""

import gc
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu import correctness, ours, peers, timing
from benchmarks.gpu.contestant import Contestant, WrongResultError, check
from benchmarks.gpu.problem import Problem, make_problem
from benchmarks.gpu.rows import Row, reason
from benchmarks.gpu.setting import Setting

# Beyond this share of the memory a contestant's blocks would push the others' out: timed alone.
CROWDED = 0.4


def run_peers(setting: Setting) -> None:
    for tokens, hidden in setting.shapes:
        own = ours.contestants(setting.device, tokens, setting.vocabulary)
        found = [*peers.contestants(setting.quick), *own]
        measure(setting, "peers", tokens, hidden, setting.vocabulary, found)


def run_verl(setting: Setting) -> None:
    """verl's kernel and ours, at a vocabulary that it computes rightly."""
    for tokens, hidden in setting.shapes:
        only = "triton" if "triton" in ours.implementations(setting.device) else "torch"
        own = ours.contestants(setting.device, tokens, setting.divided_vocabulary, only)
        found = [*peers.verl_contestants(), *own]
        measure(setting, "verl", tokens, hidden, setting.divided_vocabulary, found)


def measure(
    setting: Setting,
    stage: str,
    tokens: int,
    hidden: int,
    vocabulary: int,
    contestants: Sequence[Contestant],
) -> None:
    shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    if all(setting.rows.has(stage, c.name, **shape) for c in contestants):
        return
    setting.rows.log(f"{stage}: T={tokens} D={hidden} V={vocabulary} ...")
    # Shapes are fixed within a measurement; the compiler would make the second one dynamic.
    torch.compiler.reset()
    problem = make_problem(tokens, hidden, vocabulary, setting.dtype, setting.device, seed=tokens)
    found = {c.name: _first_look(setting, c, problem) for c in contestants}
    together: dict[str, Callable[[], None]] = {}
    alone: dict[str, Callable[[], None]] = {}
    for contestant in contestants:
        row = found[contestant.name]
        if "error" in row or "refused" in row:
            continue
        group = alone if _is_crowded(setting, row["peak_bytes"]) else together
        group[contestant.name] = _call(contestant, problem)
    samples = timing.alternate(together, setting.device, setting.rounds)
    for name, call in alone.items():
        _clear(setting.device)
        samples |= timing.alternate({name: call}, setting.device, setting.rounds // 2)
        found[name]["alone"] = True
    for contestant in contestants:
        row = {"label": contestant.label, **found[contestant.name]}
        if contestant.name in samples:
            row |= timing.spread(samples[contestant.name])
            row = timing.rate(row, contestant.units, tokens, hidden, vocabulary)
        setting.rows.add(stage, contestant.name, **shape, **row)


def _first_look(setting: Setting, contestant: Contestant, problem: Problem) -> Row:
    """Its error and peak memory, or why it is not timed."""
    if contestant.name.startswith("triton"):
        refusal = correctness.refusal(setting.rows)
        if refusal:
            return {"refused": refusal}
    try:
        row: Row = {"error_of_norm": check(contestant, problem)}
        row["peak_bytes"] = timing.peak_bytes(_call(contestant, problem), setting.device)
    except WrongResultError as wrong:
        return {"refused": str(wrong)}
    except Exception as error:
        # A peer that does not import, compile or fit is a result.
        return {"error": reason(error)}
    finally:
        _clear(setting.device)
    return row


def _call(contestant: Contestant, problem: Problem) -> Callable[[], None]:
    def call() -> None:
        contestant.run(problem)

    return call


def _is_crowded(setting: Setting, peak: int | None) -> bool:
    if peak is None:
        return False
    return peak > CROWDED * torch.cuda.get_device_properties(setting.device).total_memory


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
