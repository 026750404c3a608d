"""Parts of the Xenium reader: files, inputs and scale of a section, and the pooling of transcripts and of cells."""
