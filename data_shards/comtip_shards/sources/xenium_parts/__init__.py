"""Parts of the Xenium reader: files, the run and its scale, and the pooling of transcripts and of cells."""
