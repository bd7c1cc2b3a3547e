"""Stage `correctness`: every kernel and variant against fp64, before anything is timed.

New random numbers each run; uninitialised memory is NaN, so that what is not written shows. When
all passed, correctness-ARCHITECTURE-GPU.json is written: committed under benchmarks/results/gpu/,
it is the reason for an entry in entropy_kernels.device.VERIFIED.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import candidates, ours
from benchmarks.gpu.rows import FATAL, Rows, reason
from benchmarks.gpu.setting import Setting
from entropy_kernels._bench.result_text import result_text
from entropy_kernels.verification import head_cases, offset_cases, token_cases
from entropy_kernels.verification.head_cases import Case

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
    """Names are unique. --quick takes every fourth case: pytest runs all of them."""
    device, quick = setting.device, setting.quick
    every = slice(None, None, 4 if quick else 1)
    if ours.has_triton():
        for forward, dlogits in candidates.pairs(device, quick):
            first = (forward, dlogits) == candidates.pairs(device, quick)[0]
            dtypes = DTYPES if first and not quick else [setting.dtype]
            for dtype in dtypes:
                cases = head_cases.head_cases((forward, dlogits), dtype, device, quick)
                if first:
                    cases += offset_cases.offset_cases((forward, dlogits), dtype, device, quick)
                name = f"{candidates.name(forward)} + {candidates.name(dlogits)} {dtype}"
                yield from (case._replace(name=f"{name}: {case.name}") for case in cases[every])
    for impl in ours.elementwise_implementations(device):
        yield from token_cases.ratio_loss_cases(impl, device, quick)[every]
        yield from token_cases.selection_cases(impl, device, quick)[every]


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
