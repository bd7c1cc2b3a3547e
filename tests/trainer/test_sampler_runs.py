"""What the script of trainings with a sampler's statistics reads, joins and refuses."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import sampler_runs
from benchmarks.sampler_runs import RESULT, WAYS, tables, times, trainings
from benchmarks.sources import ROOT
from trainer.config import sources
from trainer.presets import PRESETS

STEPS = 20


def write(config, rows, **start):
    config.folder.mkdir(parents=True)
    start = {"time": "2026-01-02T03:04:05+00:00", "commit": "c0ffee", "dirty": False} | start
    start |= {"platform": "Linux"}
    run = {"config": asdict(config), "starts": [start]}
    (config.folder / "run.json").write_text(json.dumps(run))
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def rows_of(accuracy, steps):
    evaluation = {"eval/accuracy": accuracy, "eval/greedy": 0.9, "eval/problems": 1000.0}
    rows = [{"step": 0} | evaluation | {"eval/accuracy": 0.4}]
    for step in range(1, steps + 1):
        rows.append(
            {"step": step, "time/step": 2.0, "time/sample": 1.0, "time/update": 0.7}
            | {
                "time/score": 0.25,
                "time/head": 0.1,
                "mismatch/max_ratio": 1.001,
                "mismatch/kl": 2.5e-4,
            }
            | {"mask/overlap": 0.98 + 0.02 * (step > 1), "mask/entropy_difference": 1e-6}
        )
    rows[-1] |= evaluation
    return rows


@pytest.fixture
def base(tmp_path):
    return replace(PRESETS["tiny"](), root=str(tmp_path), steps=STEPS)


def configs(base, seeds, part="trainings", ways=WAYS):
    return {(way, seed): way.config(base, seed, part) for seed in range(seeds) for way in ways}


def test_ways_differ_in_engine_and_sources_alone(base):
    runs = configs(base, 1)
    assert len({config.folder for config in runs.values()}) == 4
    for (way, _), config in runs.items():
        found = sources(config)
        assert config.engine.kind == way.engine
        assert found.old_logprob == way.source
        assert found.score == (way.source == "recomputed")
        plain = replace(config, name="x", engine=base.engine, algorithm=base.algorithm)
        assert plain == replace(base, name="x")


def test_trainings_are_joined_and_compared_within_seeds(base):
    runs = configs(base, 3)
    for (way, seed), config in runs.items():
        write(config, rows_of(0.6 + 0.1 * seed + 0.05 * (way.source == "sampler"), STEPS))
    found = trainings(runs)
    assert len(found["runs"]) == 12
    text = tables({"trainings": json.loads(json.dumps(found))})
    # The mean of 0.65, 0.75 and 0.85; 1 - 0.02 / 20; seeds agree on 5 points.
    assert "| vLLM, sampler | 3 | 40.0% (37.0-43.1) | 75.0% (72.2-77.6) |" in text
    assert "| 99.900% | 98.00% | 1.0e-06 | 1 + 1.0e-03 |" in text
    assert "| transformers, sampler less recomputed | +5.0 (+4.9 to +5.1) |" in text


def test_times_are_medians_and_have_the_share_of_scoring(base, monkeypatch):
    monkeypatch.setattr(sampler_runs, "FEW_STEPS", 5)
    runs = configs(base, 1, "times")
    for config in runs.values():
        write(config, rows_of(0.5, 5))
    text = tables({"times": times(runs)})
    assert "| vLLM, recomputed | 2.000 | 1.000 | 0.250 | 0.700 | 0.100 | 12.5% |" in text


def test_runs_in_bf16_show_how_far_the_engines_are_from_the_policy(base, monkeypatch):
    monkeypatch.setattr(sampler_runs, "FEW_STEPS", 5)
    runs = configs(base, 1, "bf16", [way for way in WAYS if way.source == "recomputed"])
    for config in runs.values():
        assert config.model.compute_dtype == "bfloat16"
        assert config.model.dtype == "float32"
        assert config.algorithm.compare_every == 1
        write(config, rows_of(0.5, 5))
    text = tables({"bf16": trainings(runs)})
    assert "| vLLM | 5 | 99.60% | 98.00% | 1e-06 | 2.5e-04 | 1.001 |" in text


def test_unfinished_and_edited_runs_are_refused(base):
    runs = configs(base, 1)
    for number, config in enumerate(runs.values()):
        write(config, rows_of(0.5, STEPS), dirty=number == 3)
    with pytest.raises(ValueError, match="one commit without edits"):
        trainings(runs)
    runs = configs(replace(base, root=base.root + "/other"), 1)
    for number, config in enumerate(runs.values()):
        write(config, rows_of(0.5, STEPS - (number == 2)))
    with pytest.raises(ValueError, match=r"vllm-recomputed/seed-0 is not finished"):
        trainings(runs)


def test_the_span_of_seeds_that_the_docs_tell_is_the_one_measured():
    ends = {}
    for run in json.loads(RESULT.read_text())["trainings"]["runs"]:
        way = run["engine"], run["source"]
        ends.setdefault(way, []).append(100 * run["evaluations"]["eval/accuracy"][-1])
    assert {len(of_way) for of_way in ends.values()} == {3}
    spans = [max(of_way) - min(of_way) for of_way in ends.values()]
    text = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    assert f"three seeds span {min(spans):.1f} to {max(spans):.1f} points" in text
