"""Benchmarks for users (``comtip bench``): speed of loaders and training steps, and scores of encoders on HEST-Benchmark.

A speed benchmark compares several implementations, its *contenders*: loaders and decoders, or training steps. They are measured in
one process, in interleaved rounds, and reported as medians over the rounds.
"""
