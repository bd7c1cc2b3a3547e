"""Trackers beside metrics.jsonl: what reaches them, how they go on, and that none stops a run."""

import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import trainer.run
from tests.trainer.small import Even, save_folder, settings, use_task
from trainer.config import Config, Tracking
from trainer.log import RunLog, read_rows
from trainer.train import train

TENSORBOARD = "tensorboard is not installed (it is in the dev extra)"


class Service:
    """Stands in for wandb and trackio: keeps what it is told, by run."""

    def __init__(self, fails=()):
        self.started: list[dict] = []
        self.rows: list[dict] = []
        self.finished = 0
        self.fails = set(fails)

    def init(self, **options):
        self._maybe("init")
        self.started.append(options)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, log=self._log, finish=self.finish
        )

    def _log(self, row, step=None):
        self._maybe("log")
        self.rows.append(row if step is None else {"step": step, **row})

    def finish(self):
        self._maybe("finish")
        self.finished += 1

    def _maybe(self, what):
        if what in self.fails:
            raise ConnectionError(f"no network at {what}")


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    """The name of a library and what stands in for it."""
    found = Service()
    module = SimpleNamespace(init=found.init, finish=found.finish, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, found


def open_log(folder, *trackers, step=-1):
    config = Config(tracking=Tracking(trackers, project="p"))
    log = RunLog.open(folder / "a", config)
    log.rewind(step)
    return log


def scalars(folder, key):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=TENSORBOARD
    )
    found = accumulator.EventAccumulator(str(folder / "a" / "tensorboard")).Reload()
    return [(event.step, round(event.value, 4)) for event in found.Scalars(key)]


def test_none_is_asked_for_by_default(tmp_path):
    log = open_log(tmp_path)
    log.write({"step": 0, "loss": 1.0})
    log.close()
    assert sorted(path.name for path in log.folder.iterdir()) == ["metrics.jsonl", "run.json"]


def test_tensorboard_has_the_rows_and_forgets_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard", reason=TENSORBOARD)
    log = open_log(tmp_path, "tensorboard")
    for step in range(5):
        log.write({"step": step, "loss": float(step), "reward/mean": float("nan")})
    assert scalars(tmp_path, "loss") == [(step, step) for step in range(5)]
    # Not closed: the run was killed. Its checkpoint is of step 2.
    log = open_log(tmp_path, "tensorboard", step=2)
    for step in (3, 4, 5):
        log.write({"step": step, "loss": step + 0.5, "reward/mean": 1.0})
    log.close()
    want = [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert scalars(tmp_path, "loss") == want
    # Not a number is no point.
    assert scalars(tmp_path, "reward/mean") == [(3, 1), (4, 1), (5, 1)]


def test_rows_reach_a_service_under_one_identity_until_a_fresh_start(tmp_path, service):
    name, found = service
    log = open_log(tmp_path, name)
    log.write({"step": 0, "loss": 0.5, "grad_norm": float("inf")})
    log = open_log(tmp_path, name, step=0)
    log.write({"step": 1, "loss": 0.25})
    log.close()
    assert found.rows[0] == {"step": 0, "loss": 0.5, "log/nonfinite": 1}
    assert found.rows[1] == {"step": 1, "loss": 0.25}
    assert found.finished == 1
    open_log(tmp_path, name)
    first, resumed, fresh = (start.get("id", start["name"]) for start in found.started)
    assert first == resumed != fresh
    assert {start["resume"] for start in found.started} == {"allow"}
    assert found.started[0]["project"] == "p"
    assert found.started[0]["config"]["rollout"]["group_size"] == 8


def test_one_that_fails_is_told_once_counted_and_stops_nothing(tmp_path, service):
    name, found = service
    log = open_log(tmp_path, name)
    log.write({"step": 0, "loss": 1.0})
    found.fails = {"log", "finish"}
    with pytest.warns(RuntimeWarning, match=f"tracker '{name}' failed, .*no network at log"):
        log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 1.0})
    found.fails = {"finish"}
    log.write({"step": 3, "loss": 1.0})
    log.write({"step": 4, "loss": 1.0})
    log.close()
    rows = read_rows(log.metrics_path)
    assert [row.get("log/tracker_failures") for row in rows] == [None, None, 1, 1, None]
    assert [row["step"] for row in found.rows] == [0, 3, 4]
    assert found.finished == 0


def test_one_that_does_not_start_is_an_error(tmp_path, service):
    name, found = service
    found.fails = {"init"}
    with pytest.raises(ValueError, match=f"tracker '{name}' does not start: no network at init"):
        open_log(tmp_path, name)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_missing_is_said_before_anything_else(name, monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.launch.needs.find_spec", lambda _: None)
    says = rf"{name} \(tracking.trackers {name}\): pip install {name}$"
    with pytest.raises(ValueError, match=says):
        train(replace(settings(tmp_path), tracking=Tracking((name,))))
    assert not list(tmp_path.iterdir())


def test_a_run_is_tracked_and_may_change_its_trackers(tmp_path, service, monkeypatch):
    name, found = service
    monkeypatch.setattr(trainer.run, "make_task", None)
    use_task(Even())
    config = settings(tmp_path / "runs", save_folder(tmp_path / "model"), steps=2)
    train(replace(config, tracking=Tracking((name,))))
    assert [row["step"] for row in found.rows] == [0, 1, 2]
    assert found.finished == 1
    train(replace(config, steps=3))
    train(replace(config, steps=4, tracking=Tracking((name,))))
    assert [row["step"] for row in found.rows] == [0, 1, 2, 4]
    rows = read_rows(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert found.rows[-1] == rows[-1]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (-1, 0):
        log = open_log(tmp_path, "wandb", step=step)
        log.write({"step": step + 1, "loss": 0.5, "reward/mean": 1.0})
        log.close()
    identity = json.loads((log.folder / "tracking.json").read_text())["id"]
    runs = [path.name for path in (log.folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run.endswith(identity) for run in runs)
    assert "log/tracker_failures" not in read_rows(log.metrics_path)[-1]


def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    for step in (-1, 0):
        log = open_log(tmp_path, "trackio", step=step)
        log.write({"step": step + 1, "loss": 0.5 - step, "reward/mean": 1.0})
        log.close()
    (run,) = trackio.Api().runs("p")
    assert run.name.startswith("a-")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    rows = storage.get_logs("p", run.name)
    assert [(row["step"], row["loss"], row["reward/mean"]) for row in rows] == [
        (0, 1.5, 1.0),
        (1, 0.5, 1.0),
    ]
