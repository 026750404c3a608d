"""Rehearsal of the GPU path without a GPU: the real training code runs on stand-ins for CUDA tensors.

``python -m testkit.rehearsal`` walks training steps and inference of every config in ``configs/`` and writes
``bench/rehearsal.csv``; ``--check`` compares with it. docs/kernels.md says what this proves and what it does not.
"""
