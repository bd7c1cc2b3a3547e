"""The planner's memory and flops against an update that was run and measured."""

import sys

import pytest

from benchmarks.plan_check import in_processes

# A model of 6 M parameters, whose numbers are small beside what the kernel's counters blur.
BLUR = 48e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_a_small_run_takes_what_the_planner_says():
    found = in_processes("small")
    flops = found.pop("flops of the layers")
    # The last token of a sequence enters no layer, and the planner counts it: 1 of 96.
    assert flops["measured"] == pytest.approx(flops["predicted"], rel=0.02)
    assert flops["measured"] < flops["predicted"]
    assert set(found) == {
        "weights and gradients",
        "AdamW's moments",
        "forward and backward, above them",
        "AdamW's temporaries",
    }
    for part, pair in found.items():
        blur = BLUR if part == "weights and gradients" else 0.15 * pair["predicted"] + 4e6
        assert pair["measured"] == pytest.approx(pair["predicted"], abs=blur), part
