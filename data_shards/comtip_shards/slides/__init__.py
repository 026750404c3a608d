"""Section images: opening, windowed reading, tile extraction and stain normalisation."""
