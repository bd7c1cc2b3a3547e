"""The tables of a pretrained model: its steps beside their baselines, and its head."""

import json
import math

import pytest

from benchmarks.real_model import kept, tables
from benchmarks.sampler_step import FRACTION
from benchmarks.sources import ROOT


def test_steps_stand_beside_their_baselines_for_each_model(tmp_path):
    def entry(name, seconds, peak):
        parts = {"scoring": 1.0, "forward": 2.0, "head": seconds - 4, "backward": 0.5}
        parts |= {"scoring head": 0.0, "embedding": 0.25, "optimizer": 0.25}
        return {
            "name": name,
            "label": f"label of {name}",
            "wall_s": [seconds] * 2,
            "parts_s": {part: [x] * 2 for part, x in parts.items()},
            "part_peak_bytes": {"head": peak},
            "peak_bytes": peak,
            "sums": {"loss": 0.25, "grad_norm": 1.0},
        }

    named = {"tokens": 60, "hidden": 8, "vocabulary": 100, "sequences": 4}
    run = {
        **dict.fromkeys(("machine", "commit", "date"), "x"),
        "model": "Model",
        "shape": named,
        "bytes": {"gradients": 10**9},
        "dtype": "float32",
        "threads": 2,
        "rounds": 2,
        "versions": {"torch": "2"},
        "contestants": [
            entry("trl", 10.0, 5 * 10**9),
            entry("trl-patched", 5.0, 15 * 10**8),
            entry("eager", 9.0, 4 * 10**9),
            entry("ours", 5.0, 12 * 10**8),
        ],
    }
    (tmp_path / "real_step-cpu-x.json").write_text(json.dumps(run))
    (short,) = tables.in_short(tmp_path)
    assert "| step / baseline | update / baseline | GB beyond the state | baseline's |" in short
    assert "4 of its answers, 60 tokens in all" in short
    # An update is without the second of scoring: 4 of 9, and 4 of 8.
    assert "| label of trl-patched | 0.50 | 0.44 | 0.50 | 4.00 |" in short
    assert "| label of ours | 0.56 | 0.50 | 0.20 | 3.00 |" in short
    (whole,) = tables.of(tmp_path)
    assert "| label of ours | 5.00 | 1.00 | 2.75 | 1.00 | 0.25 | 20% | 0.25 |" in whole
    assert "So its loss is that of ours, 20%, times selected / all." in whole
    assert tables.in_short(tmp_path / "empty") == tables.of(tmp_path / "empty") == []
    # Those of another model follow, its steps beside its head.
    head = {"name": "eager", "label": "eager", "wall_s": [1.0, 1.0], "error": 1e-3}
    refused = {"name": "trl", "label": "trl", "refused": "why"}
    of_head = run | {"contestants": [head, refused]}
    (tmp_path / "real_head-cpu-x.json").write_text(json.dumps(of_head))
    other = run | {"model": "Other", "contestants": run["contestants"][2:]}
    (tmp_path / "real_step-cpu-y.json").write_text(json.dumps(other))
    of_head["contestants"] = [head | {"wall_s": [2.0, 2.0]}]
    (tmp_path / "real_head-cpu-y.json").write_text(json.dumps(of_head))
    assert ["Other:" in text for text in tables.in_short(tmp_path)] == [False, True]
    first, second = tables.of(tmp_path)[0].split("Other:")
    assert "|  | s | / eager | error |\n" in first
    assert "| trl | refused: why |  |  |" in first
    assert "| eager | 2.00 | 1.00 | 1e-03 |" in second
    assert "TRL divides its loss" not in second


def test_trl_divides_its_loss_by_all_tokens():
    """As the sentence below the steps has it, of the losses that were measured."""
    paths = list((ROOT / "benchmarks" / "results").glob(kept.STEPS))
    assert paths
    for path in paths:
        run = json.loads(path.read_text())
        loss = {entry["name"]: entry["sums"]["loss"] for entry in run["contestants"]}
        tokens = run["shape"]["tokens"]
        selected = math.ceil(FRACTION * tokens)
        assert loss["trl"] == pytest.approx(loss["eager"] * selected / tokens, rel=1e-5)
