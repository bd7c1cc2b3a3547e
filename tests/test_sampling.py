"""What `--sampled` leaves out of a grid, and that nothing else is left out."""

import subprocess
import sys
from itertools import product
from pathlib import Path

from tests.sampling import sample

ROOT = Path(__file__).parents[1]
GRID = {
    f"{a}-{b}-{c}": {"a": a, "b": b, "c": c} for a, b, c in product(range(4), range(5), range(20))
}


def test_a_sample_has_its_share_and_every_value_of_every_axis():
    kept = sample(GRID, 0.2)
    assert 60 <= len(kept) <= 120
    for axis in "abc":
        assert {GRID[name][axis] for name in kept} == {point[axis] for point in GRID.values()}


def test_every_backend_runs():
    """However few points a share of a small grid has."""
    assert sample({str(x): {"backend": x} for x in range(8)}, 0.1) == {*"01234567"}


def test_a_long_list_is_no_axis_of_values_that_all_run():
    grid = {str(x): {"x": x, "y": x % 2} for x in range(300)}
    kept = sample(grid, 0.2)
    assert 40 <= len(kept) <= 80
    assert {grid[name]["y"] for name in kept} == {0, 1}


def test_a_sample_does_not_depend_on_the_order_and_grows_with_its_share():
    backwards = dict(reversed(GRID.items()))
    assert sample(backwards, 0.2) == sample(GRID, 0.2)
    assert sample(GRID, 0.2) < sample(GRID, 0.6)
    assert sample(GRID, 1.0) == {*GRID}


def test_only_marked_tests_are_sampled_and_only_if_asked(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_grid.py").write_text(
        "import pytest\n"
        "from tests.marks import sampled\n"
        "@sampled(0.1)\n"
        "@pytest.mark.parametrize('a', range(5))\n"
        "@pytest.mark.parametrize('b', range(40))\n"
        "def test_marked(a, b): pass\n"
        "@pytest.mark.parametrize('a', range(7))\n"
        "def test_plain(a): pass\n"
    )

    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.count("test_marked") for line in done.stdout.splitlines() if "::" in line]

    everything, some = collected(), collected("--sampled")
    assert (len(everything), sum(everything)) == (207, 200)
    assert 10 <= sum(some) <= 40
    assert len(some) - sum(some) == 7
