"""Benchmarks for users (``comtip bench``): speed of loaders and training steps, and scores of encoders on HEST-Benchmark.

Contenders of a speed benchmark are measured in one process, in interleaved rounds, and reported as medians over the rounds.
"""
