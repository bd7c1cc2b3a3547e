"""What makes something out of the checkout for others: run as `python -m tools.NAME`."""
