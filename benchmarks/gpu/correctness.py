"""Stage `correctness`: every kernel and variant against fp64, before anything is timed.

New random numbers each run; uninitialised memory is NaN, so that what is not written shows. When
all passed, correctness-ARCHITECTURE-GPU.json is written: committed under benchmarks/results/gpu/,
it is the reason for an entry in entropy_kernels.device.VERIFIED.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.gpu import candidates, ours
from benchmarks.gpu.rows import FATAL, Rows, reason
from benchmarks.gpu.setting import Setting
from entropy_kernels import reference
from entropy_kernels._bench.result_text import result_text
from entropy_kernels.testing import assert_within_two_bounds
from tests import kernel_cases
from tests.kernel_cases import Case

STAGE = "correctness"
SUMMARY = "summary"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(setting: Setting) -> None:
    seed = 0 if setting.quick else torch.seed() % (1 << 31)
    torch.manual_seed(seed)
    expected = []
    for case in _all_cases(setting):
        expected.append(case.name)
        if not setting.rows.has(STAGE, case.name):
            _run_case(setting, case)
    rows = {row["name"]: row for row in setting.rows.of(STAGE) if row["name"] != SUMMARY}
    failed = [name for name in expected if not rows[name]["passed"]]
    left_out = [name for name in expected if "left_out" in rows[name]]
    found = {"count": len(expected), "failed": failed, "left_out": left_out, "seed": seed}
    setting.rows.add(STAGE, SUMMARY, **found)
    _record(setting, rows, failed)


def refusal(rows: Rows) -> str:
    """Why Triton kernels are not timed; empty where they may be."""
    found = rows.of(STAGE, name=SUMMARY)
    if not found:
        return "no complete correctness run of these sources; run the stage `correctness`"
    failed = found[0]["failed"]
    return f"{len(failed)} failed correctness, the first of them {failed[0]}" if failed else ""


def _run_case(setting: Setting, case: Case) -> None:
    memory = 0
    if setting.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setting.device).total_memory
    if memory and case.bytes > 0.8 * memory:
        setting.rows.add(STAGE, case.name, passed=True, left_out=f"wants {case.bytes:.1e} bytes")
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        case.run()
    except Exception as error:
        # One wrong kernel must not hide another.
        setting.rows.add(STAGE, case.name, passed=False, error=reason(error))
        if any(words in str(error) for words in FATAL):
            raise
    else:
        setting.rows.add(STAGE, case.name, passed=True)
    finally:
        torch.use_deterministic_algorithms(False)


def _all_cases(setting: Setting) -> Iterator[Case]:
    """Names are unique."""
    device, quick = setting.device, setting.quick
    if ours.has_triton():
        for forward, dlogits in candidates.pairs(device, quick):
            first = (forward, dlogits) == candidates.pairs(device, quick)[0]
            dtypes = DTYPES if first and not quick else [setting.dtype]
            for dtype in dtypes:
                cases = kernel_cases.cases((forward, dlogits), dtype, device, quick)
                if first:
                    cases += kernel_cases.offset_cases((forward, dlogits), dtype, device, quick)
                name = f"{candidates.name(forward)} + {candidates.name(dlogits)} {dtype}"
                yield from (case._replace(name=f"{name}: {case.name}") for case in cases)
    for impl in ours.elementwise_implementations(device):
        for kind in ("dapo", "grpo"):
            run = partial(_ratio_loss, impl, kind, device)
            yield Case(f"ratio_loss {impl} {kind}", run)
        for count in (1, 1000, 4099) if quick else (1, 1000, 100_003, 3_000_017):
            run = partial(_selection, impl, count, device)
            yield Case(f"top_entropy_mask {impl} N={count}", run)


def _ratio_loss(impl: str, loss_type: str, device: torch.device) -> None:
    """Ratios inside and outside of the clips, both signs and zero advantages, ragged masks."""
    shape = (4, 131)
    logprob = -torch.rand(shape) * 3 - 4
    old, advantage = logprob + torch.randn(shape) * 0.6, torch.randn(shape)
    advantage[2] = 0.0
    mask = torch.arange(shape[1]) < torch.tensor([131, 70, 40, 0])[:, None]
    selected = torch.rand(shape) < 0.6

    def gradient(dtype: torch.dtype, loss_of: Callable[..., Any], where: torch.device) -> Any:
        x = logprob.to(where, dtype).requires_grad_()
        others = [y.to(where, dtype) for y in (old, advantage)]
        loss = loss_of(x, *others, mask.to(where), selected.to(where), loss_type)
        return [y.detach().cpu() for y in (loss, *torch.autograd.grad(loss, x))]

    def by_impl(x: Tensor, old: Tensor, advantage: Tensor, *others: Any) -> Tensor:
        mask, selected, loss_type = others
        options = {"selected": selected, "loss_type": loss_type, "impl": impl}
        return ek.ratio_loss(x, old, advantage, mask, **options)[0]

    cpu = torch.device("cpu")
    got = gradient(torch.float32, by_impl, device)
    truth, plain = (gradient(t, reference.ratio_loss, cpu) for t in (torch.float64, torch.float32))
    for triple in zip(got, truth, plain, strict=True):
        assert_within_two_bounds(*triple, triple[-1])


def _selection(impl: str, count: int, device: torch.device) -> None:
    """Heavy ties and invalid tokens, against a stable sort: the first of equal ones are kept."""
    for levels in (3, 1 << 20):
        entropy = torch.rand(count).mul(levels).floor() / levels
        mask = torch.rand(count) < 0.8
        got = ours.top_entropy_mask(entropy.to(device), mask.to(device), impl).cpu()
        order = entropy.masked_fill(~mask, -1.0).sort(descending=True, stable=True).indices
        valid = int(mask.sum())
        kept = order[: -(-valid // 5)]
        want = torch.zeros(count, dtype=torch.bool).index_fill_(0, kept, True)
        assert torch.equal(got, want), f"{int((got != want).sum())} tokens differ"


def _record(setting: Setting, rows: dict[str, Any], failed: list[str]) -> None:
    about = setting.rows.about
    gpu = re.sub(r"\W+", "-", (about["gpu"] or "interpreter").lower())
    path = setting.out / f"correctness-{about['architecture']}-{gpu}.json"
    cases = {name: row.get("left_out", row["passed"]) for name, row in rows.items()}
    found = {
        "architecture": about["architecture"],
        "passed": ours.has_triton() and not failed,
        "failed": failed,
        **about,
        "cases": cases,
    }
    path.write_text(result_text(found))
    setting.rows.log(f"wrote {path}; commit it under benchmarks/results/gpu/ if all passed")
