"""Steps of all contestants: each checked against fp64, timed, and its peak memory."""

import torch

from benchmarks.gpu import contest, ours, peers, timing
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.contestant import Contestant, check
from benchmarks.gpu.plan import OURS, PEERS
from benchmarks.gpu.problem import Problem, make_problem
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import Setting, setting_of

STAGE = "steps"


def run(rows: Rows, job: Row) -> None:
    """One group at one shape."""
    setting = setting_of(rows, job)
    tokens, hidden, vocabulary = (job[name] for name in ("tokens", "hidden", "vocabulary"))
    own = ours.contestants(setting.device, tokens, vocabulary)
    if job["group"] == "base":
        # What is most wanted comes first, and what may be wrong last.
        own.sort(key=lambda x: not x.name.startswith("triton"))
        of_csrc = [x for x in own if x.name.startswith("cuda")]
        others = [x for x in own if x not in of_csrc]
        found = [*others, *peers.baselines(setting.quick), *of_csrc]
    else:
        known = {x.name: x for x in [*own, *peers.contestants(setting.quick)]}
        found = [known[name] for name in (OURS, *PEERS[job["group"]]) if name in known]
    measure(setting, job["group"], tokens, hidden, vocabulary, found)


def measure(
    setting: Setting,
    group: str,
    tokens: int,
    hidden: int,
    vocabulary: int,
    contestants: list[Contestant],
) -> None:
    shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    # Shapes are fixed within a measurement; the compiler would make the second one dynamic.
    torch.compiler.reset()
    dtype, device = setting.sizes.dtype, setting.device
    problem = make_problem(tokens, hidden, vocabulary, dtype, device, seed=tokens)
    entries = [_entry(device, one, problem) for one in contestants]
    contest.hold(setting, STAGE, f"{group} {tokens}x{hidden}", entries, shape, OURS)


def _entry(device: torch.device, one: Contestant, problem: Problem) -> Entry:
    def call() -> None:
        one.run(problem)

    def look() -> Row:
        found: Row = {"label": one.label, "error_of_norm": check(one, problem)}
        contest.clear(device)
        return found | {"peak_bytes": timing.peak_bytes(call, device)}

    kernels = ours.kernels(one.name, problem)
    return Entry(one.name, look, call, kernels, one.units)
