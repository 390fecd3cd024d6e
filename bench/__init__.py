"""Benchmarks: each figure of README.md here is a row in `bench/results/`, written by one of these modules."""
