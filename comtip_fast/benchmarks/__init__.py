"""Measurements that users can repeat: each contender in one run, rounds interleaved, medians."""
