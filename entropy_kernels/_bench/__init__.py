"""What `python -m entropy_kernels --bench` and the checkout's benchmarks share."""
