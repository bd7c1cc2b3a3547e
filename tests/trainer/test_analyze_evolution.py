"""Evolution of entropies: overlaps and bins by hand, and checkpoints of a run."""

import json

import pytest
import torch

from tests.trainer.analyze_cases import here, models, options, sums  # noqa: F401
from tests.trainer.small import WORDS, Even, save_folder, settings
from trainer.studies.analyze.evolution import Evolution, analyze_evolution, compare
from trainer.studies.analyze.overlap import change_by_bin, overlap, rank_correlation, top_mask
from trainer.train import train


def test_overlap_is_the_share_of_the_second_that_the_first_catches():
    first = torch.tensor([1, 1, 0, 0, 0]).bool()
    second = torch.tensor([0, 1, 1, 1, 0]).bool()
    assert overlap(first, second) == pytest.approx(1 / 3)
    assert overlap(second, first) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="no tokens"):
        overlap(first, torch.zeros(5).bool())


def test_bins_hold_equal_ranks_and_their_mean_changes():
    base = torch.arange(20).flip(0).float()
    other = base + torch.where(base >= 15, 2.0, -1.0)
    found = change_by_bin(base, other, 4)
    assert [bin_["tokens"] for bin_ in found] == [5, 5, 5, 5]
    assert [bin_["upper"] for bin_ in found] == [4, 9, 14, 19]
    assert [bin_["change"] for bin_ in found] == [-1, -1, -1, 2]
    assert [bin_["absolute"] for bin_ in found] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="too few for 30 bins"):
        change_by_bin(base, other, 30)


def test_correlation_is_of_ranks():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)


def test_comparison_of_made_up_entropies():
    base = torch.linspace(0, 1, 100)
    last = base.clone()
    last[[98, 99]], last[[0, 1]] = 0.0, 2.0
    entropy_CT = torch.stack([base, base, last])
    found = compare(entropy_CT, torch.tensor([[0.0], [0.5], [0.25]]).expand(3, 100), 0.1, 10)
    assert found["overlap"][0][1] == 1
    assert found["overlap"][0][2] == pytest.approx(0.8)
    assert found["distance"] == [0.0, 0.5, 0.25]
    assert found["percentiles"][0]["50"] == pytest.approx(0.5, abs=1e-6)
    few = compare(torch.tensor([[0.0, 1.0]] * 2), torch.zeros(2, 2), 0.5, 1)["percentiles"][0]
    assert (few["20"], few["80"]) == pytest.approx((0.2, 0.8))
    assert found["below_0.01"][0] == pytest.approx(0.01)
    assert int(top_mask(base, 0.1).sum()) == 10
    assert found["bins"][0]["change"] > 0 > found["bins"][-1]["change"]


def test_a_model_and_itself_do_not_differ_and_another_does(models, sums, tmp_path):  # noqa: F811
    base, last = models
    given = options(sums, tmp_path / "out")
    path = analyze_evolution(Evolution(last, **given, checkpoints=(base, last, last), bins=5))
    found = json.loads(path.read_text())
    assert found["overlap"][1][2] == found["overlap"][2][1] == 1
    assert found["distance"][2] == 0
    assert found["distance"][1] > 0
    assert found["overlap"][0][2] < 1
    assert found["mean"][1] == found["mean"][2] != found["mean"][0]
    assert sum(bin_["tokens"] for bin_ in found["bins"]) == found["tokens"]
    assert "<svg" in path.with_name("evolution.svg").read_text()


def test_checkpoints_of_a_run_are_taken_in_their_order(tmp_path, sums, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trainer.run.make_task", lambda *_: Even())
    folder = save_folder(tmp_path / "model")
    train(settings(tmp_path, folder, steps=4, keep_checkpoints=3))
    run = str(tmp_path / "run")
    given = options(sums, tmp_path / "out")
    path = analyze_evolution(Evolution(run, **given, bins=5))
    found = json.loads(path.read_text())
    assert found["names"] == ["step-000000", "step-000002", "step-000004"]
    assert found["distance"][1] > 0


def test_what_cannot_be_compared_is_refused(models, sums, tmp_path):  # noqa: F811
    given = options(sums, tmp_path / "out")
    with pytest.raises(ValueError, match="two checkpoints or more"):
        analyze_evolution(Evolution(models[0], **given, checkpoints=(models[0],)))
    with pytest.raises(ValueError, match="no run with checkpoints"):
        analyze_evolution(Evolution(models[0], **given))
    other = save_folder(tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace(f'"{WORDS[3]}": 3', '"zero": 3'))
    with pytest.raises(ValueError, match="another vocabulary"):
        analyze_evolution(Evolution(models[0], **given, checkpoints=(models[0], other)))
    with pytest.raises(ValueError, match="bins must be at least 1; got 0"):
        Evolution(models[0], **given, bins=0)
