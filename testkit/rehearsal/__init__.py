"""Rehearsal of the GPU path without a GPU: the real training code runs on stand-ins for CUDA tensors.

``python -m testkit.rehearsal`` runs training steps of every config in ``configs/`` and inference of ``1gpu.yaml``, and writes
``bench/rehearsal.csv``, ``bench/graph_rules.csv`` and the ledger of kernels; ``--check`` compares with them. kernels/README.md
states what this proves and what it does not. One such run of a config is called a *walk*.
"""
