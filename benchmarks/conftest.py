"""Options and fixtures of the benchmarks; the environment comes first."""

from benchmarks import environment  # noqa: F401, I001

import functools
from pathlib import Path

import pytest

from benchmarks import runner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="a tiny shape, to see that the benchmarks run; writes no result files",
    )

    parser.addoption(
        "--contestants",
        type=lambda names: names.split(","),
        help="names, separated by commas, of those to measure where all would take too long",
    )

    parser.addoption(
        "--model",
        type=Path,
        help="the folder of a pretrained model, for bench_real_model; without it that is skipped",
    )


@pytest.fixture
def model(request) -> Path:
    folder = request.config.getoption("--model")
    if folder is None:
        pytest.skip("needs --model FOLDER, a pretrained model")
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(f"--model must be a folder with config.json; got {folder}")
    return folder


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def start(quick):
    """start(shapes, shape, few) gives the shape and its rounds. --quick has `few` for the first."""

    def choose(shapes, shape, few):
        if quick and shape != next(iter(shapes)):
            pytest.skip("--quick has one shape")
        return few if quick else (shape, shapes[shape])

    return choose


@pytest.fixture
def record(quick, benchmark, capsys, tmp_path):
    """record(measure) runs a suite once, measure(folder=...), and shows what it prints."""

    def run(measure):
        folder = tmp_path if quick else runner.RESULTS
        with capsys.disabled():
            print()
            measured = functools.partial(measure, folder=folder)
            benchmark.extra_info["contestants"] = benchmark.pedantic(measured, rounds=1)

    return run
