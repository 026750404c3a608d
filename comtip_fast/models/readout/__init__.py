"""Linear readout: features of tiles, statistics of sections, and the heads that predict expression from them."""
