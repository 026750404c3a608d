"""Predict memory, FLOPs, traffic and time of a run from its config, before any device is rented (docs/scaling.md)."""
