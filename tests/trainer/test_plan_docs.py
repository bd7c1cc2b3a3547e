"""docs/planning.md and docs/trainer.md say what the planner says, and what was measured."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.trainer.test_plan import job_of
from trainer.__main__ import main
from trainer.plan.devices import GPUS
from trainer.plan.memory import eager_logits
from trainer.plan.plan import plan
from trainer.presets import PRESETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "planning.md").read_text()
RUNS = [
    ("qwen3-0.6b", 1, "h100"),
    ("qwen3-1.7b", 1, "h100"),
    ("qwen3-8b", 16, "h200"),
    ("qwen3-14b", 128, "h200"),
    ("qwen3-32b", 128, "h200"),
    ("qwen3-32b-29k", 128, "h200"),
]


def row(preset, gpus, gpu):
    """The line of the table of a run."""
    found = plan(job_of(preset, gpus, gpu))
    update = max(sum(parts.values()) for name, parts in found.memory.items() if name != "sample")
    share = ", ".join(f"{found.head_share(units):.1%}" for units in (3, 1.6, 0.6))
    cells = [
        preset,
        f"{gpus} {gpu.upper()}",
        f"{sum(found.memory['sample'].values()) / 1e9:.0f}, {update / 1e9:.0f}",
        share,
        f"{eager_logits(found.job) / 1e9:.0f}",
        f"{found.seconds.step:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_the_table_is_the_planners(run):
    assert row(*run) in TEXT.splitlines()


def test_the_errors_are_those_that_were_measured():
    """Weights and gradients apart: they hold what the process loads on its way."""
    cases = json.loads((ROOT / "benchmarks" / "results" / "plan_check.json").read_text())
    worst = {}
    for parts in cases.values():
        loaded = parts.pop("weights and gradients")
        more = loaded["measured"] - loaded["predicted"]
        assert 33e6 < more < 56e6
        for part, pair in parts.items():
            if pair["predicted"] == 0:  # AdamW's temporaries, since it is fused
                assert pair["measured"] < 1e6
                continue
            error = abs(pair["predicted"] / pair["measured"] - 1)
            kind = "flops" if part.startswith("flops") else "memory"
            worst[kind] = max(worst.get(kind, 0.0), error)
    text = " ".join(TEXT.split())
    said = re.search(r"differ by at most (\S+)% of a part in memory and (\S+)% in flops", text)
    assert (f"{worst['memory']:.1%}", f"{worst['flops']:.1%}") == (f"{said[1]}%", f"{said[2]}%")


def test_every_preset_that_is_named_exists():
    named = re.findall(r"`(?:--preset )?(qwen3-[\d.]+b|llama-8b)`", TEXT)
    assert len(named) >= 4
    assert set(named) <= set(PRESETS)


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ("--gpu l40s", "fits"),
        ("--gpu a100-40gb", "fits"),
        ("--gpu 4090", "tight"),
        ("--gpu 4090 --engine.memory-utilization 0.4", "fits"),
    ],
)
def test_what_it_says_of_smaller_gpus_is_the_planners(options, verdict, capsys):
    main(shlex.split(f"plan qwen3-0.6b {options}"))
    assert re.search(rf"^{verdict}: ", capsys.readouterr().out, re.M)


def test_it_names_every_gpu_that_is_known():
    named = re.search(r"All names are (.*?)\.", TEXT, re.S)
    assert set(re.findall(r"`(.*?)`", named[1])) == set(GPUS)


TRAINER = (ROOT / "docs" / "trainer.md").read_text()
PRINTED = re.findall(r"^    \$ python -m trainer (plan .*\n(?:    .*\n)+)", TRAINER, re.M)


def words(text):
    """`text` without the way its lines are broken."""
    return " ".join(text.split())


@pytest.mark.parametrize("block", PRINTED, ids=lambda block: block[:34])
def test_what_the_walk_prints_is_what_the_planner_prints(block, capsys):
    lines = block.splitlines()
    count = 1 + sum(line.endswith("\\") for line in lines)
    command = " ".join(line.removesuffix("\\") for line in lines[:count])
    assert main(shlex.split(command)) == 0
    found = words(capsys.readouterr().out)
    shown = words(" ".join(lines[count:]))
    assert "H200" not in shown  # it stands for no measurement
    for part in re.split(r"(?=Seconds of a step)", shown):
        assert part.strip() in found


def test_the_walk_prints_three_plans():
    assert len(PRINTED) == 3
