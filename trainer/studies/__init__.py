"""The paper's studies of a run: analyses and comparisons."""
