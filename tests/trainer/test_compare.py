"""Comparisons: arms, the driver of their runs, and what their results say."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.trainer.small import save_folder, settings
from trainer.config import Config, Data, Eval
from trainer.log import read_rows, read_run
from trainer.presets import PRESETS
from trainer.studies.compare import Comparison, compare, driver, runs
from trainer.studies.compare.arms import ARMS, STUDIES, arm_config
from trainer.studies.compare.collect import collect
from trainer.studies.compare.driver import drive, is_finished
from trainer.train import train


def small(root: Path, **changes) -> Config:
    """Two steps on the ladder, whose warm start is two more."""
    config = settings(root, steps=2, eval=Eval(2, 4))
    warm = replace(config.warm_start, steps=2, traces=20, cache=str(root / "warm"))
    return replace(config, data=Data(), warm_start=warm, **changes)


# Arms.


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_what_it_says_and_nothing_else(arm):
    base = Config()
    config = arm_config(base, "ladder", arm, 3)
    assert (config.name, config.seed) == (f"ladder/{arm}/seed-3", 3)
    before, after = asdict(base.algorithm), asdict(config.algorithm)
    changed = {name: after[name] for name in after if after[name] != before[name]}
    # The default of a configuration is the top 20% by old entropies, one round of sampling.
    assert changed == {k: v for k, v in ARMS[arm].items() if before[k] != v}
    assert replace(config, name=base.name, seed=base.seed, algorithm=base.algorithm) == base


def test_studies_have_the_arms_of_the_paper():
    fractions = {
        arm_config(Config(), "x", arm, 0).algorithm.fraction for arm in STUDIES["ablation"]
    }
    assert fractions == {0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0}
    assert set(STUDIES["algorithms"]) == {"ppo", "grpo", "all", "top-20"}
    studies = tuple(STUDIES)
    assert {arm for study in studies for arm in STUDIES[study]} == set(ARMS)
    every = runs(Comparison(studies=studies, seeds=2))
    assert len({config.name for config in every}) == len(every) == 2 * len(ARMS)
    assert [config.seed for config in every] == [0] * len(ARMS) + [1] * len(ARMS)


@pytest.mark.parametrize("name", ["gmts", "clip-cov", "my.module:rule"])
def test_any_rule_is_an_arm(name):
    (config,) = runs(Comparison(arms=(name,), seeds=1))
    assert config.name == f"ladder/{name}/seed-0"
    top = arm_config(Config(), "ladder", "top-20", 0).algorithm
    assert config.algorithm == replace(top, which=name)


def test_a_rule_that_cannot_be_imported_is_told_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "drive", lambda *_: pytest.fail("the runs began"))
    asked = Comparison(arms=("no.such:rule",), config=small(tmp_path))
    with pytest.raises(ValueError, match=r"no\.such:rule: cannot import no\.such"):
        compare(asked)


def test_an_arm_named_twice_is_run_once():
    assert len(runs(Comparison(arms=("all", "all"), seeds=1))) == 1


def test_arms_are_what_they_are_called_whatever_the_preset():
    arms = {arm: arm_config(PRESETS["grpo-qwen3-8b"](), "x", arm, 0).algorithm for arm in ARMS}
    assert {arm for arm, found in arms.items() if found.loss_type == "grpo"} == {"grpo"}
    assert {arm for arm, found in arms.items() if found.clip_high == 0.2} == {"grpo", "ppo"}
    baseline = arm_config(PRESETS["qwen3-8b"](), "x", "grpo", 0).algorithm
    assert baseline == PRESETS["grpo-qwen3-8b"]().algorithm


@pytest.mark.parametrize("preset", ["qwen3-8b", "qwen3-1.7b", "tiny"])
def test_arms_of_one_round_update_where_a_few_groups_are_useful(preset):
    for arm in ("grpo", "ppo"):
        algorithm = arm_config(PRESETS[preset](), "x", arm, 0).algorithm
        assert (algorithm.max_rounds, algorithm.min_groups) == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"jobs": 0}, "jobs must be at least 1; got 0"),
        ({"hours": -1.0}, "hours must be at least 0; got -1"),
        ({"arms": ("top-40",)}, "no arm top-40"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**changes)


# The driver.


@pytest.mark.slow
def test_a_comparison_runs_each_arm_once_and_resumes(tmp_path, capsys):
    def asked(*arms):
        return Comparison(arms=arms, seeds=1, config=small(tmp_path))

    assert compare(asked("top-20")) == 0
    out = tmp_path / "ladder" / "comparison.json"
    first = json.loads(out.read_text())
    assert [(run["arm"], run["seed"]) for run in first["runs"]] == [("top-20", 0)]
    metrics = tmp_path / "ladder" / "top-20" / "seed-0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert compare(asked("top-20", "all")) == 0
    assert metrics.stat().st_mtime_ns == before
    found = json.loads(out.read_text())
    assert [run["arm"] for run in found["runs"]] == ["top-20", "all"]
    assert found["runs"][:1] == first["runs"]
    for run in found["runs"]:
        assert run["evaluations"]["step"] == [0, 2]
        assert run["training"]["step"] == [1, 2]
    assert out.with_name("comparison-ablation.svg").exists()
    # The arms of a seed share its warm start.
    assert len(list((tmp_path / "warm").iterdir())) == 1
    said = capsys.readouterr()
    assert "runs 2/2" in said.out
    idle = ", ".join(f"{run['arm']}/seed-{run['seed']}" for run in found["runs"])
    assert not any(run["rows"] for run in found["runs"])
    assert f"warning: every step of {idle} was skipped" in said.err
    assert f"report {tmp_path}/ladder/top-20/seed-0 tells why" in said.err


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path):
    good = replace(arm_config(small(tmp_path), "x", "all", 0), steps=0)
    model = replace(good.model, path=str(tmp_path / "nothing"))
    bad = replace(good, name="x/bad/seed-1", seed=1, model=model)
    blocked = arm_config(small(tmp_path), "x", "top-20", 0)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "top-20").write_text("in the way")
    outcome = drive([bad, blocked, good], jobs=2)
    assert outcome.finished == [good.name]
    assert "no model can be loaded" in outcome.failed[bad.name]
    assert "x/top-20" in outcome.failed[blocked.name]
    assert outcome.left == []


def test_no_run_is_started_that_would_end_after_the_budget(tmp_path, monkeypatch):
    configs = [arm_config(small(tmp_path), "x", arm, 0) for arm in ("all", "top-20", "top-5")]
    clock = SimpleNamespace(now=0.0)

    def a_third_of_an_hour(*_):
        clock.now += 1200.0
        return ""

    monkeypatch.setattr(driver._State, "_run", a_third_of_an_hour)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock.now))
    outcome = drive(configs, jobs=1, hours=0.5)
    assert outcome.finished == [configs[0].name]
    assert outcome.left == [config.name for config in configs[1:]]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_the_results_ends_the_comparison(tmp_path, monkeypatch, jobs):
    configs = [arm_config(small(tmp_path), "x", arm, 0) for arm in ("all", "top-20", "top-5")]
    monkeypatch.setattr(driver._State, "_run", lambda *_: time.sleep(0.1) or "")

    def full(done):
        raise OSError(28, "No space left on device")

    raised = []

    def call():
        with pytest.raises(OSError, match="No space left") as caught:
            drive(configs, jobs, on_finished=full)
        raised.append(caught.value)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(300)
    assert len(raised) == 1


def test_a_run_whose_driver_has_ended_does_not_start():
    run = subprocess.run(
        [sys.executable, "-c", driver._CHILD, "1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 1
    assert "the process that started this run has ended" in run.stderr


def test_runs_of_a_seed_wait_for_a_warm_start_alone(tmp_path):
    """Two runs of seed 0 and one of seed 1; the next are taken as threads would take them."""
    for steps, branch, wanted in (
        (2, "", ["a", "c"]),
        (0, "", ["a", "b"]),
        (2, "a run", ["a", "b"]),
    ):
        warm = replace(small(tmp_path).warm_start, steps=steps)
        configs = [
            small(tmp_path, name=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
        configs = [replace(config, warm_start=warm) for config in configs]
        state = driver._State(configs, 0.0, lambda _: None, branch)
        assert [state._take().name for _ in range(2)] == wanted


def test_runs_begin_at_a_branchs_checkpoint_with_its_evaluation(tmp_path):
    base = small(tmp_path, name="base", steps=0)
    train(base)
    configs = [small(tmp_path, name="x/all/seed-1", seed=1)]
    outcome = drive(configs, jobs=1, branch=f"{tmp_path / 'base'}@0")
    assert (outcome.finished, outcome.failed) == ([configs[0].name], {})
    (first, *_), (begun, *rows) = (
        read_rows(one.folder / "metrics.jsonl") for one in (base, *configs)
    )
    assert begun == first, "seconds too: it was not done again"
    assert [row["step"] for row in rows] == [1, 2]
    assert read_run(configs[0].folder)["origin"]["name"] == "base"
    other = replace(base, name="other")
    train(other)
    outcome = drive(configs, jobs=1, branch=str(other.folder))
    assert "holds another run" in outcome.failed[configs[0].name]
    assert collect("x", configs, {"branch": str(base.folder)})["runs"]
    assert not collect("x", configs, {"branch": str(other.folder)})["runs"]
    with pytest.raises(ValueError, match="no run to branch from"):
        compare(Comparison(arms=("all",), branch=str(tmp_path / "none"), config=configs[0]))


def test_what_a_branch_has_of_its_origin_is_no_time_and_no_rows_of_its_own(tmp_path):
    base = small(tmp_path, name="base", steps=1)
    train(base)
    config = small(tmp_path, name="x/all/seed-0", steps=3)
    assert drive([config], jobs=1, branch=f"{base.folder}@1").finished == [config.name]
    log = config.folder / "metrics.jsonl"
    rows = [row | {"time/step": 10.0, "head/active_rows": row["step"]} for row in read_rows(log)]
    rows = [row | ({"time/evaluate": 1.0} if "eval/accuracy" in row else {}) for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 1, 2, 3]
    (run,) = collect("x", [config], {"branch": f"{base.folder}@1"})["runs"]
    assert run["evaluations"]["step"] == [1, 2, 3]
    assert run["training"]["step"] == [2, 3]
    assert (run["rows"], run["seconds"]) == (5, 22.0)


def test_a_comparison_begins_at_its_branch_or_says_where_its_runs_began(tmp_path):
    base = small(tmp_path, name="base", steps=1)
    train(base)
    settings = Comparison(
        arms=("all",), seeds=1, jobs=1, label="x", config=small(tmp_path, name="run", steps=2)
    )
    at = functools.partial(replace, settings)
    with pytest.raises(ValueError, match=r"base has no checkpoint of step 7; it has 0, 1"):
        compare(at(branch=f"{base.folder}@7"))
    assert compare(at(branch=f"{base.folder}@0")) == 0
    for other in (f"{base.folder}@1", ""):
        with pytest.raises(ValueError, match=r"seed-0 began at .*base@0, not at .*--label"):
            compare(at(branch=other))
    # What is finished is so without the checkpoint that it began at.
    shutil.rmtree(base.folder / "checkpoints")
    assert compare(at(branch=f"{base.folder}@0")) == 0
    train(replace(settings.config, name="y/all/seed-0"))
    with pytest.raises(ValueError, match="its own step 0, not at"):
        compare(replace(settings, label="y", branch=f"{base.folder}@0"))


def test_a_run_whose_last_checkpoint_was_not_written_is_not_finished(tmp_path):
    config = small(tmp_path, steps=2)
    train(config)
    assert is_finished(config)
    last = config.folder / "checkpoints" / "step-000002"
    last.rename(tmp_path / "lost")
    assert (config.folder / "checkpoints" / "step-000000").exists()
    assert not is_finished(config)
    assert drive([config], jobs=1).finished == [config.name]
    assert last.exists()
    shutil.rmtree(last.parent)
    assert is_finished(config)


def test_other_settings_are_not_finished(tmp_path):
    config = small(tmp_path, steps=0)
    assert not is_finished(config)
    train(config)
    assert is_finished(config)
    assert drive([config], jobs=1).finished == [config.name]
    assert not is_finished(replace(config, eval=Eval(2, 5)))
    assert not is_finished(replace(config, steps=1))


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_runs_behind(tmp_path):
    save_folder(tmp_path / "model")
    code = f"""
from dataclasses import replace
from pathlib import Path
from tests.trainer.test_compare import small
from trainer.studies.compare.driver import drive
drive([small(Path({str(tmp_path)!r}), steps=100_000)], jobs=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(log.exists)
    (run,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not run.is_running() or run.status() == psutil.STATUS_ZOMBIE)


def wait_for(condition):
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
