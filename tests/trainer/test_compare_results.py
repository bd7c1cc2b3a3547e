"""Comparisons: intervals, tables, files and figures of their results."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest

from tests.trainer.test_compare import small
from trainer.report.charts import Mark, Panel, Series, figure, ticks
from trainer.studies.compare.arms import STUDIES, arm_config
from trainer.studies.compare.collect import collect
from trainer.studies.compare.differences import differences, holm, interval
from trainer.studies.compare.report import arm_table, curves, difference_table, final, write_files


def test_intervals_and_holm_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found.mean == 3
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert interval([2.0]).low == -math.inf
    with pytest.raises(ValueError, match="got none"):
        interval([])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_differences_are_within_seeds():
    """Seeds lie 0.1 apart, arms 0.02: unpaired it would drown."""
    noise = {0: 0.001, 1: -0.002, 2: 0.0005, 3: 0.0015, 4: -0.001}
    base = {seed: 0.3 + 0.1 * seed for seed in range(5)}
    better = {seed: base[seed] + 0.02 + noise[seed] for seed in range(5)}
    same = {seed: base[seed] + 10 * noise[seed] for seed in range(5)}
    values = {"a": better, "b": base, "c": same}
    one, two = differences(values, [("a", "b"), ("c", "b")])
    assert one.interval.mean == pytest.approx(0.02, abs=1e-3)
    assert one.distinguishable
    assert one.p_flips == 2 / 32
    assert one.p_holm == pytest.approx(2 * one.p)
    assert not two.distinguishable
    assert two.interval.low < 0 < two.interval.high
    with pytest.raises(ValueError, match="have 1 seeds in common"):
        differences({"a": {0: 1.0}, "b": base}, [("a", "b")])


def made_up(seeds=range(5)):
    """All learns 0.3, the top 20% as much, bottom 80% loses 0.2; seeds start 0.01 apart."""
    learned = {"top-20": 0.3, "all": 0.31, "bottom-80": -0.2, "grpo": 0.25}
    share = {"top-20": 0.2, "all": 1.0, "bottom-80": 0.8, "grpo": 1.0}
    found = []
    for arm, gain in learned.items():
        for seed in seeds:
            start = 0.4 + 0.01 * seed
            end = start + gain + 0.002 * ((seed * (len(arm) + 3)) % 5)
            evaluations = {"step": [0, 10], "accuracy": [start, end], "greedy": [0.5, 0.6]}
            evaluations |= {"low": [start - 0.1, end - 0.1], "high": [start + 0.1, end + 0.1]}
            evaluations |= {"problems": [96.0, 96.0]}
            steps = list(range(1, 11))
            training = {
                "step": steps,
                "reward": [0.5] * 10,
                "entropy": [0.1 + 0.01 * seed] * 9 + [None],
                "length": [20.0 + seed] * 10,
                "rows": [100 * share[arm]] * 10,
            }
            run = {"task": "ladder", "arm": arm, "seed": seed, "commits": ["c" * 40]}
            run |= {"dirty": False, "seconds": 1.0, "rows": 1000 * share[arm]}
            found.append({**run, "evaluations": evaluations, "training": training})
    return {"runs": found}


def test_tables_say_which_arms_differ():
    results = made_up()
    table = arm_table(results, "ablation").splitlines()
    assert len(table) == 2 + 3
    top = next(line for line in table if line.startswith("| top 20%"))
    # Over the seeds, and over the problems: Wilson's interval of 96 trials.
    assert "| 5 | 96 | 42.0% [32.6, 52.0] | 72.4 ±" in top
    assert "% [62.7, 80.3] | 60.0 ± 0.0% [50.0, 69.2] |" in top
    assert "200 (20%)" in top
    *lines, blank, said = difference_table(results, "ablation").splitlines()[2:]
    assert (blank, said) == ("", "Intervals are over seeds, which share their 96 problems.")
    assert [line.split("|")[1].strip() for line in lines] == [
        "all (DAPO) - top 20%",
        "bottom-80 - top 20%",
        "bottom-80 - all (DAPO)",
    ]
    assert ["**yes**" in line for line in lines] == [True, True, True]
    assert final(results, "all")[2] == pytest.approx(0.42 + 0.31 + 0.004)


def test_runs_that_updated_nothing_are_told():
    results = made_up()
    table = arm_table(results, "ablation")
    assert "updated nothing" not in table
    idle = next(run for run in results["runs"] if run["arm"] == "top-20")
    idle["rows"] = 0.0
    for values in idle["training"].values():
        values[:] = [None] * len(values)
    table = arm_table(results, "ablation")
    count = sum(run["arm"] in STUDIES["ablation"] for run in results["runs"])
    assert table.endswith(
        f"\n\n1 of {count} runs updated nothing: each of their steps was skipped."
    )
    assert "nan" not in table


def test_results_that_have_no_count_are_of_what_was_asked_for():
    results = made_up()
    for run in results["runs"]:
        del run["evaluations"]["problems"]
    for config in ({"eval_problems": 24}, {"eval": {"problems": 24}}):
        results["settings"] = {"config": config}
        assert "| 5 | 24 | 42.0% [" in arm_table(results, "ablation")


def test_one_problem_tells_little_and_no_difference():
    """Every seed of one arm has it right and every seed of the other wrong."""
    results = made_up([0, 1])
    for run in results["runs"]:
        right = float(run["arm"] == "all")
        run["evaluations"] |= {"accuracy": [right, right], "problems": [1.0, 1.0]}
    assert "| 2 | 1 | 100.0% [20.7, 100.0] |" in arm_table(results, "ablation")
    lines = difference_table(results, "ablation").splitlines()
    assert lines[-1] == "Intervals are over seeds, which share their 1 problem."
    assert "yes" not in "".join(lines)
    # The interval of rounding to multiples of 1, twice, and over two seeds.
    half = 12.706205 / math.sqrt(6) / math.sqrt(2)
    (one,) = differences({"a": {0: 1.0, 1: 1.0}, "b": {0: 0.0, 1: 0.0}}, [("a", "b")], 1.0)
    assert (one.interval.low, one.interval.high) == pytest.approx((1 - half, 1 + half), rel=1e-6)
    assert one.p > 0.1
    assert differences({"a": {0: 1.0, 1: 1.0}, "b": {0: 0.0, 1: 0.0}}, [("a", "b")])[0].p == 0


def test_files_name_their_data(tmp_path):
    written = write_files(made_up(), tmp_path / "ladder-comparison.json")
    assert [path.name for path in written] == [
        "ladder-comparison-ablation.md",
        "ladder-comparison-ablation.svg",
        "ladder-comparison-algorithms.md",
        "ladder-comparison-algorithms.svg",
    ]
    assert "<desc>ladder-comparison.json</desc>" in written[1].read_text()
    assert "GRPO" in written[2].read_text()
    # One seed has no interval, and no difference can be told.
    one = made_up([0])
    assert "±" not in arm_table(one, "ablation")
    assert "no difference can be told" in difference_table(one, "ablation")
    assert "all (DAPO)" in curves(one, "ablation", "x")
    assert "held-out accuracy, 96 problems" in curves(one, "ablation", "x")


def test_collecting_counts_the_rows_that_were_paid_for(tmp_path):
    config = arm_config(small(tmp_path, steps=3), "x", "top-20", 0)
    assert collect("x", [config], {"seeds": 1})["runs"] == []
    folder = tmp_path / config.name
    folder.mkdir(parents=True)
    starts = [{"commit": "c" * 40, "dirty": True}, {"commit": "d" * 40, "dirty": False}]
    (folder / "run.json").write_text(json.dumps({"config": asdict(config), "starts": starts}))
    accuracy = {"eval/accuracy": 0.5, "eval/greedy": 0.6, "eval/length": 9.0, "time/evaluate": 1.0}
    accuracy |= {"eval/problems": 7.0, "eval/low": 0.2, "eval/high": 0.8}
    step = {"reward/mean": 0.5, "response/length": 9.0, "time/step": 2.0}
    updated = step | {"head/active_rows": 19.0, "head/rows": 100.0, "entropy/mean": 0.1234567}
    rows = [accuracy, updated, step | {"skipped/few_groups": 1.0}, updated | accuracy]
    lines = [json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (found,) = collect("x", [config], {"seeds": 1})["runs"]
    assert (found["arm"], found["seed"], found["seconds"]) == ("top-20", 0, 8.0)
    assert (found["commits"], found["dirty"]) == (["c" * 40, "d" * 40], True)
    assert found["evaluations"]["step"] == [0, 3]
    assert found["evaluations"]["problems"] == [7.0, 7.0]
    assert found["evaluations"]["high"] == [0.8, 0.8]
    assert found["training"]["rows"] == [19.0, 0.0, 19.0]
    assert found["training"]["all_rows"] == [100.0, 0.0, 100.0]
    assert found["training"]["entropy"] == [0.123457, None, 0.123457]
    assert found["rows"] == 38.0


# Figures.


def test_a_figure_draws_every_point_and_keeps_labels_apart():
    marks = [Mark(x, x / 10, x / 10 - 0.1, x / 10 + 0.1) for x in range(5)]
    series = [Series(f"line <{i}>", marks, i) for i in range(4)]
    alone = Series("alone", [Mark(2, 0.2, -math.inf, math.inf)], joined=False)
    text = figure([Panel("title", "x", [*series, alone])], "data.json")
    assert text.count("<circle") == 1
    assert text.count('class="band') == 4
    assert "inf" not in text
    assert "line &lt;3&gt;" in text
    ys = sorted(
        float(line.split('y="')[1].split('"')[0])
        for line in text.splitlines()
        if 'class="name' in line
    )
    assert all(b - a > 13.9 for a, b in pairwise(ys))
    with pytest.raises(ValueError, match="no point is finite"):
        figure([Panel("t", "x", [Series("s", [Mark(0, math.nan, 0, 0)])])], "")


def test_ticks_are_round_and_enclose():
    assert ticks(0.13, 0.87) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]
