"""Entropies and fractions for the tests of the selection."""

from hypothesis import strategies as st

INF, NAN = float("inf"), float("nan")
FRACTIONS = [0.2, 0.1, 0.55, 1.0, 1e-9]
# Ties, both zeros and infinities; then any fp32 at all.
TIED = st.sampled_from([-INF, -1.5, -1e-45, -0.0, 0.0, 1e-45, 0.25, 1.0, 3.0, INF, NAN])
VALUES = TIED | st.floats(width=32)
