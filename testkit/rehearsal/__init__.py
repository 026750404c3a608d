"""Rehearsal of the GPU path without a GPU: the real training code runs on stand-ins for CUDA tensors.

``python -m testkit.rehearsal`` runs training steps and inference of every config in ``configs/`` and writes
``bench/rehearsal.csv`` and ``bench/graph_rules.csv``; ``--check`` compares with them. kernels/README.md states what this proves
and what it does not. One such run of a config is called a *walk*.
"""
