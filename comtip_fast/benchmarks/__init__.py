"""Benchmarks for users: contenders are measured in one process, in interleaved rounds, and reported as medians."""
