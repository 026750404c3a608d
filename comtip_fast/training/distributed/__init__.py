"""Distributed training: process groups, timing of collectives, failures, restarts and signals."""
