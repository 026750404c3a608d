"""Predictions over numbers of devices: the table and figures of docs/scaling.md."""
