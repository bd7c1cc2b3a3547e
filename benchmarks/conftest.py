"""Options of the benchmarks; the environment comes first."""

from benchmarks import environment  # noqa: F401, I001

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="a tiny shape, to see that the benchmarks run; writes no result files",
    )
