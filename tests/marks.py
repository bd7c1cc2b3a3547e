"""Marks that several test files use."""

import pytest

from tests.conftest import BACKENDS, params_of

# The share of a test's parameters that run with `--sampled`, as `make test` does. All others run
# with `make test-thorough`.
sampled = pytest.mark.sampled
# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
nan_is_meant = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
# test_triton_kernel_cases.py has these cases at the sizes of Triton's interpreter.
not_interpreted = pytest.mark.parametrize(
    "backend", params_of(x for x in BACKENDS if x != ("triton", "cpu")), indirect=True
)
