"""Benchmarks: each claim of the README is a row in `bench/results/`, written by one of these modules."""
