"""The page's own findings, on made-up results whose answers are known."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import paper_findings
from benchmarks.paper_results import NOTHING, share_above

BEFORE = {0: 0.2, 1: 0.4}


def run(arm, seed, after):
    accuracy = [BEFORE[seed], after]
    return {"arm": arm, "seed": seed, "evaluations": {"step": [0, 60], "accuracy": accuracy}}


@pytest.fixture
def results(tmp_path):
    runs = [run("all", 0, 0.6), run("all", 1, 0.8), run("top-20", 0, 0.5), run("top-20", 1, 0.7)]
    runs.append(run("top-50", 1, 0.8))
    (tmp_path / "ladder-comparison.json").write_text(json.dumps({"runs": runs}))
    cdf = {"points": [0.1, 0.2, 0.4], "shares": [0.6, 0.7, 0.9]}
    for seed in BEFORE:
        (tmp_path / f"ladder-patterns-seed-{seed}.json").write_text(json.dumps({"cdf": cdf}))
    return tmp_path


def test_fractions_are_compared_with_all_tokens_within_seeds(results):
    head, _, row = paper_findings.fractions(results).split("\n\n")[0].splitlines()
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert cells[" above 0.3 nats "] == " 20.0% "
    assert cells[" top 20% "] == " -10.0 ± 0.0 "
    assert cells[" top 50% "].strip() == ""  # one seed tells no difference


def test_gain_is_a_share_of_the_gain_of_all_tokens(results):
    (task,) = paper_findings._tasks(results)
    assert paper_findings._gain(task, "top-20").mean == pytest.approx((0.3 / 0.4 + 0.3 / 0.4) / 2)
    assert paper_findings._gain(task, "top-50").mean == pytest.approx(1.0)
    assert paper_findings._gain(task, "top-50").seeds == 1
    drawn = ElementTree.fromstring(paper_findings.draw_fractions(results))
    assert drawn[0].text == "benchmarks/results/paper/ladder-comparison.json"


def test_nothing_measured_is_said(tmp_path):
    assert paper_findings.fractions(tmp_path) == NOTHING
    assert paper_findings.masks(tmp_path) == NOTHING
    assert paper_findings.draw_fractions(tmp_path) is None


def test_masks_are_compared_by_their_age(tmp_path):
    overlap = [[1.0, 0.8, 0.6], [0.8, 1.0, 0.7], [0.6, 0.7, 1.0]]
    found = {"names": ["a", "b", "c"], "overlap": overlap, "correlation": [1.0, 0.9, 0.8]}
    for seed in BEFORE:
        path = tmp_path / f"ladder-evolution-all-seed-{seed}.json"
        path.write_text(json.dumps(found))
    row = paper_findings.masks(tmp_path).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "ladder, all",
        "75.0 ± 0.0%",
        "60.0 ± 0.0%",
        "80.0 ± 0.0%",
    ]


def test_share_above_is_taken_between_two_points():
    cdf = {"points": [0.1, 0.2, 0.4], "shares": [0.6, 0.7, 0.9]}
    assert share_above(0.25, {"cdf": cdf}) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"no points around 0\.5"):
        share_above(0.5, {"cdf": cdf})
