"""The sweep over two temperatures: its points, and that a stopped one goes on."""

import json

import pytest

import trainer.studies.analyze.temperatures
from tests.trainer.analyze_cases import here, models, options, sums  # noqa: F401
from trainer.evaluation.command import Evaluation, evaluate_model
from trainer.studies.analyze.temperatures import Temperatures, analyze_temperatures

LOW, HIGH = (0.0, 1.0), (1.0, 2.0)


@pytest.fixture
def asked(models, sums, tmp_path):  # noqa: F811
    return Temperatures(models[0], **options(sums, tmp_path / "out"), low=LOW, high=HIGH)


def points(found):
    return {(point["low"], point["high"]): point for point in found["points"]}


def test_points_are_those_of_the_figure(asked, models, sums, tmp_path):  # noqa: F811
    found = json.loads(analyze_temperatures(asked).read_text())
    assert set(points(found)) == {(0.0, 1.0), (1.0, 1.0), (1.0, 2.0)}
    assert found["threshold"] > 0
    assert "<svg" in (tmp_path / "out" / "temperatures.svg").read_text()
    # Both at 1: what an evaluation finds, whose random numbers are the same.
    given = options(sums, tmp_path / "plain")
    results = json.loads(evaluate_model(Evaluation(models[0], **given)).read_text())
    plain = results["sets"][sums]
    both = points(found)[1.0, 1.0]
    assert both["accuracy"] == plain["avg@4"]
    assert both["length"] == plain["length"]["mean"]


def test_a_stopped_sweep_goes_on(asked, monkeypatch):
    whole, calls = trainer.studies.analyze.temperatures._accuracy, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(trainer.studies.analyze.temperatures, "_accuracy", stopped)
    with pytest.raises(KeyboardInterrupt):
        analyze_temperatures(asked)
    path = analyze_temperatures(asked)
    assert len(calls) == 1 + 1 + 2
    assert len(json.loads(path.read_text())["points"]) == 3
    analyze_temperatures(asked)
    assert len(calls) == 4
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        analyze_temperatures(Temperatures(**vars(asked) | {"seed": 1}))


def test_a_given_threshold_is_not_measured(asked, monkeypatch):
    monkeypatch.setattr(trainer.studies.analyze.temperatures, "_threshold", None)
    given = Temperatures(**vars(asked) | {"threshold": 0.4, "low": (), "high": (1.0,)})
    found = json.loads(analyze_temperatures(given).read_text())
    assert found["threshold"] == 0.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature must be 1"),
        ({"fraction": 2.0}, "fraction must lie"),
        ({"low": (-1.0,)}, "low must be finite"),
        ({"threshold": -1.0}, "threshold must be finite"),
    ],
)
def test_bad_settings_are_refused(asked, changes, message):
    with pytest.raises(ValueError, match=message):
        Temperatures(**vars(asked) | changes)
