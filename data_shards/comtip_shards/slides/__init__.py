"""Section images: opening, windowed reading, tile cutting and stain normalisation."""
