"""`python -m benchmarks.gpu`: floors, correctness, tiles, peers and memory on one GPU."""
