"""Files of a checkpoint in parts, one per rank: their index, and reading and writing of one part."""
