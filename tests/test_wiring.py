"""docs/method.md tells right wiring from wrong: its table is what the script measures."""

import pytest
import torch

from benchmarks import wiring
from tests.loss_cases import policy_loss

RIGHT = "nothing"


@pytest.fixture(scope="module")
def measured():
    return wiring.measure()


@pytest.fixture(scope="module")
def documented():
    page = wiring.PAGE.read_text()
    block = page.partition("<!-- wiring:begin -->\n")[2].partition("<!-- wiring:end -->")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
    assert [name.strip("`") for name in head[1:]] == list(wiring.METRICS)
    return {name: dict(zip(wiring.METRICS, map(float, row), strict=True)) for name, *row in lines}


def test_right_wiring_has_ratio_one_and_no_kl(measured):
    row = measured[RIGHT]
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert row["ratio/max"] == pytest.approx(1, abs=1e-4)
    assert row["kl/k1"] == pytest.approx(0, abs=1e-5)
    assert row["kl/k3"] == pytest.approx(0, abs=1e-6)


def test_each_mistake_can_be_told_from_right_wiring(measured):
    for name, row in measured.items():
        off = abs(row["ratio/mean"] - 1) > 5e-3 or row["kl/k3"] > 1e-3 or row["ratio/max"] > 1.02
        assert off == (name != RIGHT), name


def test_the_documented_table_is_what_is_measured(documented, measured):
    """Training and sampling on another processor differ a little; largest ratios are one token."""
    assert list(documented) == list(measured)
    for name, row in measured.items():
        for metric in wiring.METRICS:
            loose = metric == "ratio/max"
            want = pytest.approx(documented[name][metric], rel=3 if loose else 0.3, abs=0.05)
            assert row[metric] == want, (name, metric)


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_metrics_are_those_of_the_loss():
    """Results of the library's own call, which on a CPU takes log-probabilities alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = wiring.build_model()
        batch = wiring.sample(model)
        arguments = wiring.right(model, batch) | {"temperature": 1.0}
        _, metrics = policy_loss(**arguments, fraction=1.0)
        shown = wiring.shown(arguments)
    for metric in wiring.METRICS:
        assert float(metrics[metric]) == pytest.approx(shown[metric], rel=1e-4, abs=1e-6), metric
    for wrong in (batch.old_logprob.exp(), -batch.old_logprob):
        with pytest.raises(ValueError, match="old_logprob must be log-probabilities"):
            policy_loss(**arguments | {"old_logprob": wrong[:, 1:]}, fraction=1.0)
