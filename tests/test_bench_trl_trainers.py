"""The table of TRL's trainers: what it says of a result, and a run of one trainer."""

import json

import pytest

from benchmarks import trl_trainers

SIZES = {"vocabulary": 64, "hidden": 16, "length": 8, "batch": 4, "steps": 2, "rounds": 1}


def result():
    theirs = {"losses": [2.0, -4.0], "norms": [1.0, 5.0], "forward": [30, 50], "backward": [30, 50]}
    ours = {
        "losses": [2.0, -4.002],
        "norms": [1.0, 5.05],
        "forward": [20, 40],
        "backward": [10, 20],
    }
    theirs |= {"seconds": [1.0, 3.0], "bytes": [5_000_000]}
    ours |= {"seconds": [0.5, 1.0], "bytes": [2_000_000]}
    about = {"machine": "a CPU", "threads": 2, "commit": "abc", "date": "2026-11-29"}
    about |= {"versions": {"trl": "1.16.0"}, "settings": SIZES}
    return about | {"trainers": {"sft": {"theirs": theirs, "ours": ours}}}


def test_the_table_has_medians_and_the_largest_difference(tmp_path):
    assert trl_trainers.of(tmp_path) == []
    (tmp_path / "trl_trainers.json").write_text(json.dumps(result()))
    (text,) = trl_trainers.of(tmp_path)
    assert "| SFT | 5.0e-04 | 1.0e-02 | 40 | 30 | 40 | 15 | 2.00 | 0.75 | 5 | 2 |" in text
    assert "V = 64, D = 16, 2 steps in each of 1 rounds; a CPU, 2 threads; trl 1.16.0" in text


def test_losses_of_nothing_but_rounding_are_not_compared():
    assert trl_trainers.differences([2e-7, -1e-7], [-2e-7, 0.0]) == ""
    assert trl_trainers.differences([1.0, 2.0], [1.0, 2.0]) == "0.0e+00"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_measures_both_heads_and_is_resumed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="its trainers are measured")
    monkeypatch.setattr(trl_trainers, "KINDS", ("sft", "rloo"))
    command = [x for name, size in SIZES.items() for x in (f"--{name}", str(size))]
    command += ["--out", str(tmp_path / "out.json")]
    assert trl_trainers.main(command) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    for ways in found["trainers"].values():
        theirs, ours = ways["theirs"], ways["ours"]
        assert trl_trainers.difference([*ours["losses"], 1.0], [*theirs["losses"], 1.0]) < 1e-5
        assert trl_trainers.difference(ours["norms"], theirs["norms"]) < 1e-4
        assert min(theirs["norms"]) > 0
        assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
        assert all(0 < a <= b for a, b in zip(ours["forward"], theirs["forward"], strict=True))
        assert max(ours["backward"]) > 0
    # RLOO's responses may all be of full length. Padding and prompts of SFT are always there.
    sft = found["trainers"]["sft"]
    assert sum(sft["ours"]["forward"]) < sum(sft["theirs"]["forward"])
    assert sft["ours"]["backward"] == sft["ours"]["forward"]
    monkeypatch.setattr(trl_trainers, "measure", None)
    assert trl_trainers.main(command) == 0
    assert "| RLOO |" in capsys.readouterr().out
