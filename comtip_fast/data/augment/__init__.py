"""Augmented views of tiles: zoom, rotation, mirroring, stain normalisation and jitter."""
