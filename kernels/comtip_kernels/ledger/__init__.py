"""Proof without a GPU: what ahead-of-time compilation says of every kernel, gated against a committed table."""
