"""Tools that make releases from the checkout; run them as `python -m tools.NAME`."""
