"""Parts of the Visium HD reader: files, scale, and the pooling of bins and of cells."""
