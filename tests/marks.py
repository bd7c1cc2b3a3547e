"""Marks that several test files use."""

import pytest

# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
nan_is_meant = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
