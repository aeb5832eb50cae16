"""Benchmarks: fastft beside PyTorch, on this machine, in one run."""
