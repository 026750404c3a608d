"""Random views of tiles: flips, turns, stain and colour jitter."""
